"""PGD against its floor: steps × (forward + input-only backward) of the same batch, in the same process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import click
import torch

from adversarial import PGD, attack, load_encoder, sample_generators, squared_error


@click.command()
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(encoder: str, batch: int, steps: int, repeats: int, threads: int, device: str) -> None:
    """Print medians and their ratio."""
    torch.set_num_threads(threads)
    model = load_encoder(encoder, device).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    clean = (torch.rand((batch, *model.input_shape), generator=generator) * 255).round().to(device) / 255
    with torch.no_grad():
        target = model(clean)
    settings = PGD(Fraction(2, 255), Fraction(1, 255), steps)

    def ours() -> None:
        attack(model, clean, target, squared_error, settings, sample_generators(0, "benchmark", batch))

    def floor() -> None:
        for _ in range(steps):
            pixels = clean.clone().requires_grad_()
            torch.autograd.grad(squared_error(model(pixels), target + 1).sum(), pixels)

    floor()
    rounds = [(_seconds(ours, device), _seconds(floor, device)) for _ in range(repeats)]
    mine, bare = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    click.echo(f"attack {mine:.3f} s, floor {bare:.3f} s, ratio {ratio:.3f} ({repeats} interleaved rounds)")


def _seconds(work: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
