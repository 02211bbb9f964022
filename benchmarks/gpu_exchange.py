"""Part of `benchmarks.gpu`: cost of the exchange of gradients for a single process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from benchmarks.gpu_rows import Rates, Row, Sizes, sizes, timed
from datamerge.attacks.arithmetic import arithmetic
from datamerge.encoders import load_encoder
from trainer.run.distributed import BACKENDS, EXCHANGE_SECONDS, Processes
from trainer.run.exchange import Exchange


def exchange_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Gradients are put into buckets, summed by NCCL over this process alone, and put back: after and during a pass.

    The time includes copies, launches, the meeting over gloo and the wait, but no transfer between GPUs.
    """
    size = sizes(rehearse)
    with _alone(size.device) as own, arithmetic(size.device, tf32=True):
        for (name, spec), images in zip((("base", size.base), ("large", size.large)), size.batch, strict=True):
            yield from _exchange(name, spec, images, own, size)


def _exchange(name: str, spec: str, images: int, own: Processes, size: Sizes) -> Iterator[Row]:
    encoder = load_encoder(spec, str(size.device))
    exchange = Exchange(own, [parameter for parameter in encoder.parameters() if parameter.requires_grad])
    gigabytes = sum(parameter.nbytes for parameter in exchange.parameters) / 1e9
    pixels = torch.rand(images, *encoder.input_shape, device=size.device)
    numbers = torch.zeros(5, device=size.device)

    def passes() -> None:
        encoder.zero_grad(set_to_none=True)
        encoder(pixels).square().sum().backward()

    def alone() -> None:
        exchange.finish(numbers)

    def during() -> None:
        with exchange.sending(True):
            passes()
        exchange.finish(numbers)

    plain, memory = timed(passes, size.device, size.repeats)
    what = f"{name}, tf32, {images} images: both passes"
    yield Row("exchange", what, plain, gigabytes=memory)
    ms, memory = timed(during, size.device, size.repeats)
    yield Row("exchange", f"{what}, gradients sent meanwhile", ms, gigabytes=memory)
    ms, memory = timed(alone, size.device, size.repeats)
    sent = f"{name}: gradients of {gigabytes:.2f} GB in {len(exchange.buckets)} buckets, sent at once"
    yield Row("exchange", sent, ms, rate=gigabytes / (ms / 1000), unit="GB", gigabytes=memory)


@contextmanager
def _alone(device: torch.device) -> Iterator[Processes]:
    """A process group of this process alone, which acts as one of two processes."""
    backends = BACKENDS if device.type == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backends, store=store, rank=0, world_size=1)
    try:
        yield Processes(0, 2, 0, EXCHANGE_SECONDS)
    finally:
        dist.destroy_process_group()
