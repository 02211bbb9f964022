"""Projected gradient descent in the ℓ∞ ball (Madry et al. 2018), as FARE uses it (PAPER §3 and §4).

    x'_0 = x + U(−ε, ε);   x'_{t+1} = Π[ x'_t + α·sign ∇ L(f(x'_t), target) ],   Π onto ‖δ‖∞ ≤ ε and [0, 1]

The last iterate is returned, unless its loss is below the start's, in which case the start is: an attack never
makes things easier. Encoder parameters get no gradient. Every sample has its own generator, so what it becomes
does not depend on its neighbours in the batch.

On the 8-bit grid the iteration runs in units of 1/255: the start is uniform over the grid points of the ball,
α·255 = 1 steps stay on the grid, all bounds are small integers and hold exactly. Off the grid the bounds are
float32 numbers rounded towards x.

Shapes: B samples, C H W pixels, K embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from adversarial.objectives import Objective
from storage_schemas import ConfigError, DatamergeError

LEVELS = 255


class NonFiniteGradient(DatamergeError):  # noqa: N818
    """The attack met a loss or gradient that is not finite. `indices` are the samples' positions in the batch."""

    def __init__(self, indices: Sequence[int], names: Sequence[str], step: int) -> None:
        self.indices = list(indices)
        super().__init__(
            f"step {step} of the attack: the loss or its gradient is not finite for {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        )


@dataclass(frozen=True, slots=True)
class PGD:
    """Settings of the attack; lengths are exact fractions of the pixel range.

    Attributes:
        epsilon: radius of the ℓ∞ ball.
        step_size: α.
        steps: number of gradient steps.
        random_start: start at x + U(−ε, ε) rather than at x.
        on_grid: keep pixels on multiples of 1/255.
    """

    epsilon: Fraction
    step_size: Fraction
    steps: int
    random_start: bool = True
    on_grid: bool = True

    def __post_init__(self) -> None:
        if self.on_grid and 0 < self.epsilon < Fraction(1, LEVELS):
            raise ConfigError(
                f"epsilon {self.epsilon}: a ball smaller than 1/255 holds no other 8-bit image; "
                "use epsilon >= 1/255 or leave the grid (--no-grid)"
            )


@dataclass(frozen=True, slots=True)
class Attacked:
    """Result of an attack.

    Attributes:
        pixels: float32 [B, C, H, W] in [0, 1].
        start_loss: objective at the start, [B].
        loss: objective at `pixels`, [B], never below `start_loss`.
    """

    pixels: Tensor
    start_loss: Tensor
    loss: Tensor


def attack(
    model: nn.Module,
    clean: Tensor,
    target: Tensor,
    objective: Objective,
    settings: PGD,
    generators: Sequence[np.random.Generator],
    names: Sequence[str] = (),
) -> Attacked:
    """Attack a batch.

    Args:
        model: takes pixels [B, C, H, W] in [0, 1]; should be in eval mode.
        clean: float32 [B, C, H, W] in [0, 1]; multiples of 1/255 when `settings.on_grid`.
        target: the objective's second argument, one row per sample.
        objective: loss per sample to maximise.
        settings: the attack's.
        generators: one source of randomness per sample.
        names: how errors call the samples; their positions by default.

    Raises:
        NonFiniteGradient: names the samples whose loss or gradient is not finite.
    """
    scale = float(LEVELS) if settings.on_grid else 1.0
    lower, upper, centre = _ball(clean, settings)
    points = centre + _start(clean, settings, generators) if settings.random_start else centre
    points = points.clamp(lower, upper)
    start = points
    step = float(settings.step_size) * scale
    start_loss = None
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        for index in range(settings.steps):
            pixels = (points / scale).requires_grad_()
            loss = objective(model(pixels), target)
            (gradient,) = torch.autograd.grad(loss.sum(), pixels)
            _check_finite(loss, gradient, names, index)
            start_loss = loss.detach() if start_loss is None else start_loss
            points = (points + step * gradient.sign()).clamp(lower, upper)
        if settings.on_grid and (settings.step_size * LEVELS).denominator != 1:
            # The bounds are integers, so rounding stays inside them.
            points = points.round()
        with torch.no_grad():
            loss = objective(model(points / scale), target)
        # The last iterate has no gradient, but its loss goes into the record.
        _check_finite(loss, torch.zeros_like(points), names, settings.steps)
        return _keep_better(start, points, loss, start_loss, scale)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)


def sample_generators(seed: int, key: str, count: int) -> list[np.random.Generator]:
    """Independent generators for `count` members of group `key`: a function of the seed and the key alone."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], "<u4").tolist()
    return [np.random.default_rng(child) for child in np.random.SeedSequence([seed, *words]).spawn(count)]


def _ball(clean: Tensor, settings: PGD) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper bounds and the centre of the search, in the units of the iteration."""
    if settings.on_grid:
        centre = (clean * LEVELS).round()
        radius = math.floor(settings.epsilon * LEVELS)
        return (centre - radius).clamp_min(0), (centre + radius).clamp_max(LEVELS), centre
    wide, radius64 = clean.double(), float(settings.epsilon)
    lower, upper = (wide - radius64).float(), (wide + radius64).float()
    # Conversion to float32 may round outwards; step back to the last number inside.
    lower = torch.where(wide - lower.double() > radius64, torch.nextafter(lower, clean), lower)
    upper = torch.where(upper.double() - wide > radius64, torch.nextafter(upper, clean), upper)
    return lower.clamp_min(0), upper.clamp_max(1), clean


def _start(clean: Tensor, settings: PGD, generators: Sequence[np.random.Generator]) -> Tensor:
    """Random offsets, drawn on the CPU so that they are the same on every device."""
    shape = tuple(clean.shape[1:])
    if settings.on_grid:
        radius = math.floor(settings.epsilon * LEVELS)
        offsets = [generator.integers(-radius, radius, shape, np.int16, endpoint=True) for generator in generators]
        return torch.from_numpy(np.stack(offsets)).to(clean.device, torch.float32)
    uniform = [generator.random(shape, np.float32) for generator in generators]
    return (torch.from_numpy(np.stack(uniform)).to(clean.device) * 2 - 1) * float(settings.epsilon)


def _keep_better(start: Tensor, points: Tensor, loss: Tensor, start_loss: Tensor | None, scale: float) -> Attacked:
    """The last iterate, or the start where that has the higher loss."""
    if start_loss is None:  # zero steps: the start is the last iterate
        return Attacked(points / scale, loss, loss)
    worse = loss < start_loss
    points = torch.where(worse.view(-1, 1, 1, 1), start, points)
    return Attacked(points / scale, start_loss, torch.maximum(loss, start_loss))


def _check_finite(loss: Tensor, gradient: Tensor, names: Sequence[str], step: int) -> None:
    finite = torch.isfinite(loss) & torch.isfinite(gradient.flatten(1).sum(dim=1))
    if not bool(finite.all()):
        indices = torch.nonzero(~finite).flatten().tolist()
        raise NonFiniteGradient(indices, [names[i] if i < len(names) else f"sample {i}" for i in indices], step)
