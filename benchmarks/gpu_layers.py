"""Parts of `benchmarks.gpu`: peak rates, single layers, and memory formats of convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.gpu_rows import PRECISIONS, RATES, Rates, Row, Sizes, sizes, timed
from datamerge.attacks.arithmetic import arithmetic


def rate_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Peak rates for the shares: matrix products of random numbers (zeros are faster), and copies."""
    size = sizes(rehearse)
    for precision in PRECISIONS:
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        one, other = (torch.randn(size.side, size.side, device=size.device).to(dtype) for _ in range(2))
        with arithmetic(size.device, tf32=precision == "tf32"):
            ms, _ = timed(lambda: one @ other, size.device, size.repeats)  # noqa: B023 - at once
        yield Row(RATES, precision, ms, rate=2 * size.side**3 / 1e12 / (ms / 1000), unit="TFLOP")
    values = torch.randn(4 * size.side, size.side, device=size.device)
    ms, _ = timed(values.clone, size.device, size.repeats)
    yield Row(RATES, "copy on the device", ms, rate=2 * values.nbytes / 1e9 / (ms / 1000), unit="GB")
    here = torch.zeros(size.side, size.side, dtype=torch.float32)
    for what, source in (("pageable", here), ("pinned", here.pin_memory() if not rehearse else here)):
        ms, _ = timed(lambda: source.to(size.device, non_blocking=True), size.device, size.repeats)  # noqa: B023 - at once
        yield Row(RATES, f"copy to the device, {what}", ms, rate=here.nbytes / 1e9 / (ms / 1000), unit="GB")


def layer_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Input gradient through two forms of a patch embedding, and through a ResNet in both memory formats."""
    from benchmarks.gpu_attack import attack_row
    from datamerge.encoders import load_encoder

    size = sizes(rehearse)
    count, side = (2, 16) if rehearse else (256, 224)
    for patch, width in ((8, 4),) if rehearse else ((32, 768), (14, 1024)):
        yield from _patches(size, count, side, patch, width)
    for order in (torch.channels_last, torch.contiguous_format):
        encoder = load_encoder(size.convolutional, str(size.device)).requires_grad_(False)
        for module in encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.to(memory_format=order)  # type: ignore[call-overload]  # missing in torch's types
        for precision in size.precisions:
            what = f"{size.convolutional}, {precision}, {str(order).removeprefix('torch.')}"
            yield replace(attack_row(what, encoder, size.images[0], precision, size, rates), part="layers")


def _patches(size: Sizes, count: int, side: int, patch: int, width: int) -> Iterator[Row]:
    """Input gradient through one patch embedding."""
    pixels = torch.rand(count, 3, side, side, device=size.device, requires_grad=True)
    weight = torch.randn(width, 3, patch, patch, device=size.device)

    def convolution() -> Tensor:
        return nn.functional.conv2d(pixels, weight, stride=patch)

    def product() -> Tensor:
        cut = pixels.unflatten(3, (-1, patch)).unflatten(2, (-1, patch)).permute(0, 2, 4, 1, 3, 5).flatten(3)
        return torch.matmul(cut, weight.flatten(1).T)

    for precision in PRECISIONS[:2]:
        for name, forward in (("convolution", convolution), ("product", product)):

            def gradient(forward: Callable[[], Tensor] = forward, half: bool = precision == "bfloat16") -> None:
                with torch.autocast(size.device.type, torch.bfloat16, enabled=half):
                    outputs = forward()
                torch.autograd.grad(outputs.sum(), pixels)

            with arithmetic(size.device, tf32=True):
                ms, memory = timed(gradient, size.device, size.repeats)
            what = f"patches of {patch} pixels, {count} images, as a {name}, {precision}"
            yield Row("layers", what, ms, gigabytes=memory)
