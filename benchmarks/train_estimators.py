"""Compare estimators of the merged loss: bias, noise, cost and memory, as a Markdown table.

The moments of the group are known: every pixel of a random image moves by −2 … 2 levels of 255, uniformly and
independently, so the variance is exactly 2/255² and the covariance is diagonal. The target is the embedding of the
mean image, so L(x̄) = 0 and the group's mean loss equals the correction.

    bias     (mean estimate − mean loss of the members) / mean loss of the members, ± one standard error
    noise    standard deviation of one estimate / mean loss of the members
    gradient noise    ‖gradient − mean gradient‖ (root mean square over draws) / ‖mean gradient‖
    cost     time of loss and backward / time of a forward pass without graph: medians of interleaved rounds
    memory   bytes that autograd saves / those of mean_only
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder
from datamerge.runtime.checkout import commit
from trainer import (
    Draws,
    GroupLoss,
    SquaredError,
    antithetic,
    gauss_newton,
    individual_loss,
    mean_only,
    sampled,
)

LEVEL, RADIUS = 1 / 255, 2
MODELS = "mlp:1x28x28-256-64,timm:resnet18,open_clip:ViT-B-32"


class Cloud:
    """A group, its moments, and estimates of its loss."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        generator = torch.Generator().manual_seed(0)
        shape = (1, *encoder.input_shape)
        self.mean = torch.randint(RADIUS, 256 - RADIUS, shape, generator=generator).float() * LEVEL
        self.variance = torch.full(
            shape, sum(d * d for d in range(-RADIUS, RADIUS + 1)) / (2 * RADIUS + 1) * LEVEL**2
        )
        with torch.no_grad():
            self.target = encoder(self.mean)
        self.generator = generator

    def members(self, count: int) -> Tensor:
        """Draw members, [count, C, H, W], on the 8-bit grid."""
        offsets = torch.randint(
            -RADIUS, RADIUS + 1, (count, *self.encoder.input_shape), generator=self.generator, dtype=torch.int16
        )
        return ((self.mean / LEVEL).round() + offsets) / 255

    def loss(self, estimate: Callable[..., GroupLoss], seed: int) -> Tensor:
        """One estimate, [1]."""
        return estimate(self.encoder, self.mean, self.variance, self.target, SquaredError(), Draws([seed])).loss

    def individual(self, count: int) -> Tensor:
        """Mean loss of the given members, [1]."""
        return individual_loss(self.encoder, self.members(count), [count], self.target, SquaredError()).loss


@click.command()
@click.option("--encoders", default=MODELS, show_default=True, help="Comma-separated specs.")
@click.option("--draws", default=32, show_default=True)
@click.option(
    "--truth", default=512, show_default=True, type=click.IntRange(32), help="Members for the true mean loss."
)
@click.option("--repeats", default=5, show_default=True, help="Rounds of timing.")
@click.option("--threads", default=1, show_default=True)
def main(encoders: str, draws: int, truth: int, repeats: int, threads: int) -> None:
    """Print one table per encoder."""
    torch.set_num_threads(threads)
    click.echo(
        f"`python -m benchmarks.train_estimators --draws {draws} --truth {truth} --repeats {repeats} "
        f"--threads {threads}`, commit {commit()}, {date.today()}, "
        f"{platform.machine()} CPU, torch {torch.__version__}\n"
    )
    for spec in encoders.split(","):
        _table(Cloud(load_encoder(spec)), spec, draws, truth, repeats)


def _table(cloud: Cloud, spec: str, draws: int, truth: int, repeats: int) -> None:
    with torch.no_grad():
        values = torch.stack([_members_loss(cloud) for _ in range(truth // 16)])
    true, error = float(values.mean()), float(values.std() / len(values) ** 0.5)
    estimators: dict[str, Callable[[int], Tensor]] = {
        "mean_only": lambda seed: cloud.loss(mean_only, seed),
        "gauss_newton": lambda seed: cloud.loss(gauss_newton, seed),
        "gauss_newton, S = 4": lambda seed: cloud.loss(partial(gauss_newton, samples=4), seed),
        "sampled": lambda seed: cloud.loss(sampled, seed),
        "antithetic": lambda seed: cloud.loss(antithetic, seed),
        "2 members": lambda seed: cloud.individual(2),
        "10 members": lambda seed: cloud.individual(10),
    }
    seconds = _times(cloud, estimators, repeats)
    base = _saved_bytes(lambda: estimators["mean_only"](0))
    click.echo(
        f"**{spec}**\n\n| estimator | bias | noise | gradient noise | cost | memory |\n|---|---|---|---|---|---|"
    )
    for name, estimate in estimators.items():
        found, gradient_noise = _moments(cloud, estimate, 1 if name == "mean_only" else draws)
        mean, deviation = float(found.mean()), float(found.std()) if len(found) > 1 else 0.0
        spread = ((deviation**2 / len(found) + error**2) ** 0.5) / true
        noise = "0" if len(found) == 1 else f"{deviation / true:.3f}"
        memory = _saved_bytes(lambda: estimate(0)) / base  # noqa: B023 - called at once
        click.echo(
            f"| {name} | {(mean - true) / true:+.3f} ± {spread:.3f} | {noise} | {gradient_noise} | "
            f"{seconds[name]:.1f} | {memory:.1f} |"
        )
    click.echo()


def _members_loss(cloud: Cloud) -> Tensor:
    return cloud.individual(16)[0]


def _moments(cloud: Cloud, estimate: Callable[[int], Tensor], draws: int) -> tuple[Tensor, str]:
    """Values of the estimates, and the relative noise of their gradients."""
    parameters = list(cloud.encoder.parameters())
    values, total, squares = [], [torch.zeros_like(p) for p in parameters], 0.0
    for seed in range(draws):
        loss = estimate(seed).sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        values.append(float(loss.detach()))
        squares += sum(float(g.square().sum()) for g in gradients)
        torch._foreach_add_(total, list(gradients))
    mean_square = sum(float((t / draws).square().sum()) for t in total)
    if draws == 1 or mean_square == 0:
        return torch.tensor(values), "–"
    variance = (squares / draws - mean_square) * draws / (draws - 1)
    # The mean of few draws is noisy itself; if it is mostly noise, only a bound is known.
    signal = mean_square - variance / draws
    if signal < variance / draws:
        return torch.tensor(values), f"> {draws**0.5:.0f}"
    return torch.tensor(values), f"{(variance / signal) ** 0.5:.2f}"


def _times(cloud: Cloud, estimators: dict[str, Callable[[int], Tensor]], repeats: int) -> dict[str, float]:
    def forward(seed: int) -> None:
        with torch.no_grad():
            cloud.encoder(cloud.mean)

    def step(estimate: Callable[[int], Tensor]) -> Callable[[int], None]:
        def run(seed: int) -> None:
            cloud.encoder.zero_grad(set_to_none=True)
            estimate(seed).sum().backward()

        return run

    work: dict[str, Callable[[int], None]] = {"forward": forward}
    work |= {name: step(estimate) for name, estimate in estimators.items()}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(repeats + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run(round_number)
            if round_number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    pairs = {name: zip(seconds[name], seconds["forward"], strict=True) for name in estimators}
    return {name: statistics.median(a / b for a, b in both) for name, both in pairs.items()}


def _saved_bytes(make: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that autograd holds for the backward pass of a loss."""
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Keep the storages alive, so that no address is reused.
        storages[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        make()
    return sum(size for size, _ in storages.values())


if __name__ == "__main__":
    main()
