"""PGD compared with its floor, and with torchattacks and Foolbox on the same model, batch, steps and random starts.

The floor is steps × (forward + input-only backward) of the same batch, in the same process. The peers maximise the
same loss: cross entropy of a linear head on the embedding, with the predicted labels of the clean images.

`load_encoder` converts convolutions to channels-last; "as built" is the same network without that, as the peers
attack it. Our attack ends with one more forward pass, for the loss of its result: 1/(2·steps) of the floor.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from fractions import Fraction

import click
import torch
from torch import Tensor, nn

from datamerge.attacks import PGD, Precision, arithmetic, attack, cross_entropy, sample_generators
from datamerge.encoders import load_encoder

EPSILON, STEP_SIZE = Fraction(2, 255), Fraction(1, 255)


@click.command()
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option(
    "--precision", default="float32", show_default=True, help="Precision of our attack: float32, tf32 or bfloat16."
)
@click.option("--compile/--no-compile", "compiled", default=False, show_default=True)
def main(
    encoder: str,
    batch: int,
    steps: int,
    repeats: int,
    threads: int,
    device: str,
    precision: Precision,
    compiled: bool,
) -> None:
    """Print medians, ratios of interleaved rounds, and the loss that each attack reaches."""
    torch.set_num_threads(threads)
    rounds, reached = measure(encoder, batch, steps, repeats, device, precision, compiled)
    for name, loss in reached.items():
        seconds = statistics.median(found[name] for found in rounds)
        ratio = statistics.median(found[name] / found["ours"] for found in rounds)
        click.echo(f"{name:22} {seconds:8.3f} s, {ratio:.3f} of ours, loss {loss:.5f}")
    for floor in ("floor", "floor, as built"):
        ratio = statistics.median(found["ours"] / found[floor] for found in rounds)
        click.echo(f"ours over the {floor}: {ratio:.3f} ({repeats} interleaved rounds, batch {batch}, {steps} steps)")


def measure(
    encoder: str,
    batch: int,
    steps: int,
    repeats: int,
    device: str = "cpu",
    precision: Precision = "float32",
    compiled: bool = False,
) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Seconds of each implementation in every round, and the loss that it reaches."""
    network = load_encoder(encoder, device).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, network.embedding_dim, generator=generator).to(device)
    model = nn.Sequential(network, _linear(weight)).eval()
    clean = (torch.rand((batch, *network.input_shape), generator=generator) * 255).round().to(device) / 255
    with torch.no_grad():
        labels = model(clean).argmax(dim=1)
    attacked: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]  # a Module to torch
    as_built = copy.deepcopy(model).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # torch has no overload for the format alone

    def ours(precision: Precision) -> Tensor:
        settings = PGD(EPSILON, STEP_SIZE, steps)
        generators = sample_generators(0, "benchmark", batch)
        return attack(attacked, clean, labels, cross_entropy, settings, generators, precision=precision).pixels

    contenders = {
        "ours": lambda: ours(precision),
        "ours, bfloat16": lambda: ours("bfloat16"),
        "floor": lambda: _passes(model, clean, labels, steps),
        "floor, as built": lambda: _passes(as_built, clean, labels, steps),
        **_peers(model, clean, labels, steps),
        **{f"{name}, as built": work for name, work in _peers(as_built, clean, labels, steps).items()},
    }
    with arithmetic(torch.device(device), tf32=precision == "tf32"):  # the floor and the peers are no faster for less
        reached = {name: _loss(model, work(), labels) for name, work in contenders.items()}  # also warms up
        rounds = [{name: _seconds(work, device) for name, work in contenders.items()} for _ in range(repeats)]
    return rounds, reached


def _passes(model: nn.Module, clean: Tensor, labels: Tensor, steps: int) -> Tensor:
    """The floor: only forward and backward passes."""
    pixels = clean
    for _ in range(steps):
        pixels = clean.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(model(pixels), labels).sum(), pixels)
    return pixels.detach()


def _linear(weight: Tensor) -> nn.Module:
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.device)
    head.weight = nn.Parameter(weight, requires_grad=False)
    return head


def _peers(model: nn.Module, clean: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], Tensor]]:
    """Other implementations of ℓ∞ PGD, as their documentation shows them."""
    peers: dict[str, Callable[[], Tensor]] = {}
    try:
        import torchattacks

        other = torchattacks.PGD(model, float(EPSILON), float(STEP_SIZE), steps, random_start=True)
        peers["torchattacks"] = lambda: other(clean, labels)
    except ImportError:
        click.echo("torchattacks is not installed: left out")
    try:
        from foolbox.attacks import LinfPGD
        from foolbox.models.pytorch import PyTorchModel

        wrapped = PyTorchModel(model, bounds=(0, 1), device=clean.device)
        linf = LinfPGD(abs_stepsize=float(STEP_SIZE), steps=steps, random_start=True)
        peers["foolbox"] = lambda: linf(wrapped, clean, labels, epsilons=float(EPSILON))[1]
    except ImportError:
        click.echo("foolbox is not installed: left out")
    return peers


def _loss(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float(cross_entropy(model(pixels), labels).mean())


def _seconds(work: Callable[[], Tensor], device: str) -> float:
    started = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
