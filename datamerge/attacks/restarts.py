"""Any attack by its settings, with restarts; and the sign of one gradient, to compare precisions."""

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
    """Attack a batch `restarts` times from new starts and keep, for every sample, the strongest result.

    Other arguments, results and errors are those of `datamerge.attacks.attack`; `start_loss` is the first start's.

    Args:
        draws: what `draw_starts` gave before, if it did; taken from `generators` if empty.
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
    """What `run_attack` would draw, before it and in any thread: one tensor [B, C, H, W] a restart.

    Args:
        settings: of the attack.
        shape: C, H, W.
        generators: one source of randomness per sample; not used for anything after it.
        restarts: as in `run_attack`.
        pinned: whether the memory is pinned, from which a GPU copies while other work goes on.

    Returns:
        Empty where the attack has no random start.
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
