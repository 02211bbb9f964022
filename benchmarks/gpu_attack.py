"""Parts of `benchmarks.gpu`: attack steps, and possible ways to speed them up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from fractions import Fraction
from unittest.mock import patch

import torch
from torch import nn

from benchmarks.gpu_rows import Rates, Row, Sizes, launches, share, sizes, teraflops, timed
from datamerge.attacks import Ball, Precision, ascend, frozen, squared_error
from datamerge.attacks.ball import Gradients
from datamerge.encoders import Encoder, load_encoder

STEPS = 3


def attack_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """PGD steps, without random starts and final losses."""
    size = sizes(rehearse)
    for name, spec in (("base", size.base), ("large", size.large)):
        encoder = load_encoder(spec, str(size.device)).requires_grad_(False)
        for precision in size.precisions:
            for count in size.images[:1] if precision == "float32" else size.images[: 3 if name == "base" else 2]:
                yield attack_row(f"{name}, {precision}, {count} images", encoder, count, precision, size, rates)
        with patch("datamerge.attacks.arithmetic.fixed_order", lambda _: nullcontext()):
            what = f"{name}, bfloat16, {size.images[0]} images, sums in any order"
            yield attack_row(what, encoder, size.images[0], "bfloat16", size, rates)


def launch_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """The same steps with fewer launches: number of kernels, as a CUDA graph, and compiled."""
    size = sizes(rehearse)
    encoder, count = load_encoder(size.base, str(size.device)).requires_grad_(False), size.images[0]
    what = f"base, bfloat16, {count} images"
    step = _step(encoder, encoder, count, "bfloat16", size)
    step()
    plain = timed(step, size.device, size.repeats).ms
    yield _row(f"{what}, {launches(step, size.device)} launches", plain, count)
    graph = _graph(step, size.device)
    captured = timed(graph, size.device, size.repeats).ms
    yield _row(f"{what}, CUDA graph, {launches(graph, size.device)} launches", captured, count)
    compiled = torch.compile(encoder, backend="eager" if rehearse else "inductor")
    yield replace(
        attack_row(f"{what}, compiled", encoder, count, "bfloat16", size, rates, compiled),  # type: ignore[arg-type]  # a module all the same
        part="launches",
    )


def _row(what: str, ms: float, count: int) -> Row:
    return Row("launches", f"{what}: an image and step", ms / count, rate=1000 * count / ms, unit="images")


def _graph(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A step captured as a CUDA graph, on fixed tensors; on a CPU the step itself."""
    if device.type != "cuda":
        return step
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):  # libraries allocate at the first step of a stream
        step()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _step(
    model: nn.Module, encoder: Encoder, count: int, precision: Precision, size: Sizes, steps: int = 1
) -> Callable[[], None]:
    """Attack steps on random images; every call continues the last."""
    clean = (torch.rand(count, *encoder.input_shape) * 255).round().to(size.device) / 255
    target = torch.zeros(count, encoder.embedding_dim, device=size.device)
    ball = Ball.around(clean, Fraction(2, 255), grid=True)
    gradients = Gradients(model, target, squared_error, ball.scale, precision)
    points = ball.centre.clone()

    def run() -> None:
        with frozen(model):
            ascend(ball, gradients.at, points, 1.0, steps)

    return run


def attack_row(
    what: str,
    encoder: Encoder,
    count: int,
    precision: Precision,
    size: Sizes,
    rates: Rates,
    model: nn.Module | None = None,
) -> Row:
    """Attack steps on `count` images, with an encoder, or with `model` made from it."""
    repeats = 2 if precision == "float32" else size.repeats
    run = _step(encoder if model is None else model, encoder, count, precision, size, STEPS)
    ms, memory = timed(run, size.device, repeats)
    ms /= STEPS * count
    part = share(ms, teraflops(_step(encoder, encoder, 1, precision, size)), rates, precision)
    return Row("attack", f"{what}: an image and step", ms, part, 1000 / ms, "images", memory)
