"""Projected gradient descent in the ℓ∞ ball (Madry et al. 2018), as FARE uses it (PAPER §3 and §4).

    x'_0 = x + U(−r, r);   x'_{t+1} = Π[ x'_t + α·sign ∇ L(f(x'_t), target) ],   Π onto ‖δ‖∞ ≤ ε and [0, 1]

with r = ε by default. The result is the last iterate, or the start if its loss is higher. Encoder parameters get no
gradient. Every sample has its own random generator, so its result does not depend on the rest of the batch.

On the 8-bit grid the start is uniform over the grid points of the ball, and steps of whole levels stay on the grid.

Shapes: B samples, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from torch import Tensor, nn

from datamerge.attacks.ball import (
    Attacked,
    Ball,
    Gradients,
    Precision,
    check_ball,
    frozen,
    parse_lengths,
    radius_of_starts,
)
from datamerge.attacks.objectives import Objective
from storage_schemas import LEVELS


@dataclass(frozen=True, slots=True)
class PGD:
    """Settings of the attack; lengths are exact fractions of the pixel range, and may be given as `2/255`.

    Attributes:
        epsilon: radius of the ℓ∞ ball.
        step_size: α.
        steps: number of gradient steps.
        random_start: start at x + U(−r, r) rather than at x.
        grid: keep pixels on multiples of 1/255.
        start_radius: r, at most ε; ε if None.

    Raises:
        ConfigError: a length is invalid, or the start is outside the ball.
    """

    epsilon: Fraction
    step_size: Fraction
    steps: int
    random_start: bool = True
    grid: bool = True
    start_radius: Fraction | None = None

    def __post_init__(self) -> None:
        parse_lengths(self, "epsilon", "step_size", "start_radius")
        check_ball(self.epsilon, self.grid, self.start_radius)


def attack(
    model: nn.Module,
    clean: Tensor,
    target: Tensor,
    objective: Objective,
    settings: PGD,
    generators: Sequence[np.random.Generator],
    names: Sequence[str] = (),
    *,
    precision: Precision = "float32",
    draws: Tensor | None = None,
) -> Attacked:
    """Attack a batch.

    Args:
        model: takes pixels [B, C, H, W] in [0, 1]; should be in eval mode.
        clean: float32 [B, C, H, W] in [0, 1]; multiples of 1/255 when `settings.grid`.
        target: second argument of the objective, one row per sample.
        objective: loss per sample to maximise.
        settings: settings of the attack.
        generators: one random generator per sample.
        names: names of the samples, for errors; their positions by default.
        precision: precision of the forward passes; the perturbation is always float32.
        draws: random numbers of the start, from `draw_starts`; drawn from `generators` if None.

    Raises:
        NonFiniteGradient: names the samples whose loss or gradient is not finite.
    """
    ball = Ball.around(clean, settings.epsilon, settings.grid)
    start = ball.start(settings.random_start, radius_of_starts(settings), generators, draws)
    step = float(settings.step_size) * ball.scale
    gradients = Gradients(model, target, objective, ball.scale, precision)
    with frozen(model):
        points = start.clone()
        start_loss = ascend(ball, gradients.at, points, step, settings.steps)
        if settings.grid and (settings.step_size * LEVELS).denominator != 1:
            # The bounds are integers, so rounding stays inside them.
            points.round_()
        loss = gradients.loss_at(points)
        start_loss = loss if start_loss is None else gradients.start_loss(start, start_loss)
    gradients.check(names)
    return ball.choose(start, start_loss, points, loss)


def ascend(
    ball: Ball, at: Callable[[Tensor], tuple[Tensor, Tensor]], points: Tensor, step_size: float, steps: int
) -> Tensor | None:
    """The loop of PGD alone, from any start: step along the sign of the gradient and project onto the ball.

    Args:
        ball: search region.
        at: gives loss [B] and gradient [B, C, H, W] at points; the gradient is overwritten.
        points: start inside the ball, in its units; moved in place.
        step_size: α, in the ball's units.
        steps: number of gradient steps.

    Returns:
        The loss at the start, [B]; None without steps.
    """
    start_loss = None
    for _ in range(steps):
        loss, gradient = at(points)
        start_loss = loss if start_loss is None else start_loss
        ball.clamp_(points.add_(gradient.sign_(), alpha=step_size))
    return start_loss
