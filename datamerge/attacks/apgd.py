"""Auto-PGD (Croce & Hein 2020, algorithm 1): momentum, step sizes that halve, the best iterate.

    z   = Π[ x_t + η_t·d(∇ L(x_t)) ];   x_{t+1} = Π[ x_t + a·(z − x_t) + (1 − a)·(x_t − x_{t−1}) ],   a = 0.75

d is the sign in the ℓ∞ ball, ∇/‖∇‖₂ in the ℓ2 ball. η starts at 2ε by default. At checkpoints, with shrinking
intervals, a sample's η is halved and its search continues from its best point, if at most ρ = 0.75 of the steps since
the last checkpoint raised its loss, or if neither η nor the best loss has changed since then. On the 8-bit grid the
best point is rounded at the end, which keeps it inside the ball.

Shapes: B samples, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
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
from datamerge.attacks.euclidean import EuclideanBall, Norm
from datamerge.attacks.objectives import Objective
from storage_schemas import ConfigError

MOMENTUM = 0.75
RHO = 0.75


@dataclass(frozen=True, slots=True)
class APGD:
    """Settings of the attack; lengths are exact fractions of the pixel range. See `PGD` for their meaning.

    Attributes:
        norm: norm of the ball; with `l2`, epsilon bounds ‖δ‖₂ and results are off the grid.
        initial_step: η at the start, in units of ε.

    Raises:
        ConfigError: a length is invalid, the start is outside the ball, or `l2` is asked for on the grid.
    """

    epsilon: Fraction
    steps: int
    random_start: bool = True
    grid: bool = True
    start_radius: Fraction | None = None
    norm: Norm = "linf"
    initial_step: Fraction = Fraction(2)

    def __post_init__(self) -> None:
        parse_lengths(self, "epsilon", "start_radius", "initial_step")
        check_ball(self.epsilon, self.grid, self.start_radius)
        if self.norm == "l2" and self.grid:
            raise ConfigError("norm: expected results off the 8-bit grid with l2, found grid on; use `grid=False`")


def checkpoints(steps: int) -> set[int]:
    """Steps, counted from 1, after which step sizes may be halved: W of the paper, as in its authors' code."""
    period, shortest, shrink = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
    found, step = set(), period
    while step <= steps:
        found.add(step)
        period = max(period - shrink, shortest)
        step += period
    return found


def apgd(
    model: nn.Module,
    clean: Tensor,
    target: Tensor,
    objective: Objective,
    settings: APGD,
    generators: Sequence[np.random.Generator],
    names: Sequence[str] = (),
    *,
    precision: Precision = "float32",
    initial: Tensor | None = None,
    draws: Tensor | None = None,
) -> Attacked:
    """Attack a batch with APGD, using `settings.steps` + 1 gradients.

    The other arguments, the result and the errors are those of `datamerge.attacks.attack`.

    Args:
        initial: pixels [B, C, H, W] to start from, e.g. the best of an earlier attack, instead of a random start;
            projected onto the ball.
        draws: random numbers of the start, from `draw_starts`; drawn from `generators` if None.
    """
    ball = ball_of(settings).around(clean, settings.epsilon, settings.grid)
    if initial is not None:
        start = ball.clamp_(initial * ball.scale)
    else:
        start = ball.start(settings.random_start, radius_of_starts(settings), generators, draws)
    gradients = Gradients(model, target, objective, ball.scale, precision)
    with frozen(model):
        if settings.steps == 0:
            points = start
            start_loss = loss = gradients.loss_at(start)
        else:
            search = _Search(ball, gradients, start, float(settings.initial_step * settings.epsilon) * ball.scale)
            turns = checkpoints(settings.steps)
            for step in range(1, settings.steps + 1):
                search.step()
                if step in turns:
                    search.reconsider()
            points = search.best.round_() if settings.grid else search.best
            loss = gradients.loss_at(points)
            start_loss = gradients.start_loss(start, search.start_loss)
    gradients.check(names)
    return ball.choose(start, start_loss, points, loss)


def ball_of(settings: APGD) -> type[Ball]:
    """The class of the ball in the settings' norm."""
    return EuclideanBall if settings.norm == "l2" else Ball


class _Search:
    """State of the iteration over B samples, each with its own step size."""

    def __init__(self, ball: Ball, gradients: Gradients, start: Tensor, step_size: float) -> None:
        self._ball, self._gradients = ball, gradients
        self._points, self._previous = start, start
        self.start_loss, self._gradient = gradients.at(start)
        self._loss = self._best_loss = self.start_loss
        self.best, self._best_gradient = start.clone(), self._gradient
        self._step_size = torch.full((len(start), 1, 1, 1), step_size, device=start.device, dtype=start.dtype)
        self._momentum = 1.0  # the first step has no momentum term
        self._steps = 0
        self._raised = torch.zeros_like(self._loss)
        self._checked_loss = self._best_loss
        self._halved = torch.ones_like(self._loss, dtype=torch.bool)

    def step(self) -> None:
        """Move all samples and update the best point of each."""
        towards = self._ball.clamp_(self._points + self._step_size * self._ball.direction(self._gradient))
        moved = self._points + self._momentum * (towards - self._points)
        moved += (1 - self._momentum) * (self._points - self._previous)
        self._points, self._previous = self._ball.clamp_(moved), self._points
        self._momentum = MOMENTUM
        loss, self._gradient = self._gradients.at(self._points)
        self._raised += loss > self._loss
        self._steps += 1
        better = loss > self._best_loss
        self._loss, self._best_loss = loss, torch.where(better, loss, self._best_loss)
        better = better.view(-1, 1, 1, 1)
        self.best = torch.where(better, self._points, self.best)
        self._best_gradient = torch.where(better, self._gradient, self._best_gradient)

    def reconsider(self) -> None:
        """Halve the step size of samples that have stopped gaining, and restart them from their best point."""
        oscillates = self._raised <= RHO * self._steps
        stuck = ~self._halved & (self._checked_loss >= self._best_loss)
        self._halved = oscillates | stuck
        self._checked_loss = self._best_loss
        self._raised, self._steps = torch.zeros_like(self._raised), 0
        halve = self._halved.view(-1, 1, 1, 1)
        self._step_size = torch.where(halve, self._step_size / 2, self._step_size)
        self._points = torch.where(halve, self.best, self._points)
        self._gradient = torch.where(halve, self._best_gradient, self._gradient)
