"""Runs PGD or APGD with restarts; and gives the sign of one gradient, to compare precisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks.apgd import APGD, apgd, ball_of
from datamerge.attacks.ball import Attacked, Ball, Gradients, Precision, frozen, radius_of_starts
from datamerge.attacks.objectives import Objective
from datamerge.attacks.pgd import PGD, attack


def run_attack(
    model: nn.Module,
    clean: Tensor,
    target: Tensor,
    objective: Objective,
    settings: PGD | APGD,
    generators: Sequence[np.random.Generator],
    names: Sequence[str] = (),
    *,
    restarts: int = 1,
    precision: Precision = "float32",
    draws: Sequence[Tensor] = (),
) -> Attacked:
    """Attack a batch `restarts` times from new starts and keep the strongest result of every sample.

    The other arguments, the result and the errors are those of `datamerge.attacks.attack`; `start_loss` is that of
    the first start.

    Args:
        restarts: number of starts.
        draws: random numbers of the starts, from `draw_starts`; drawn from `generators` if empty.
    """

    def once(number: int) -> Attacked:
        drawn = draws[number] if draws else None
        if isinstance(settings, APGD):
            return apgd(
                model, clean, target, objective, settings, generators, names, precision=precision, draws=drawn
            )
        return attack(model, clean, target, objective, settings, generators, names, precision=precision, draws=drawn)

    best = once(0)
    for number in range(1, restarts):
        other = once(number)
        stronger = other.loss > best.loss
        pixels = torch.where(stronger.view(-1, 1, 1, 1), other.pixels, best.pixels)
        best = Attacked(pixels, best.start_loss, torch.maximum(other.loss, best.loss))
    return best


def draw_starts(
    settings: PGD | APGD,
    shape: tuple[int, ...],
    generators: Sequence[np.random.Generator],
    *,
    restarts: int = 1,
    pinned: bool = False,
) -> list[Tensor]:
    """Draw the random numbers of `run_attack` in advance, in any thread: one tensor [B, C, H, W] per restart.

    Args:
        settings: settings of the attack.
        shape: C, H, W.
        generators: one random generator per sample; `run_attack` then needs none.
        restarts: as in `run_attack`.
        pinned: whether to use pinned memory, from which a GPU copies asynchronously.

    Returns:
        The tensors; empty if the attack has no random start.
    """
    if not settings.random_start:
        return []
    kind = ball_of(settings) if isinstance(settings, APGD) else Ball
    radius = radius_of_starts(settings)
    return [kind.draw(shape, radius, settings.grid, generators, pinned) for _ in range(restarts)]


def gradient_sign(
    model: nn.Module, pixels: Tensor, target: Tensor, objective: Objective, precision: Precision
) -> Tensor:
    """Sign of the objective's gradient at pixels [B, C, H, W] in [0, 1]."""
    with frozen(model):
        _, gradient = Gradients(model, target, objective, 1.0, precision).at(pixels)
    return gradient.sign()
