"""Any attack by its settings, with restarts; and the sign of one gradient, to compare precisions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks.apgd import APGD, apgd
from datamerge.attacks.ball import Attacked, Gradients, Precision, frozen
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
) -> Attacked:
    """Attack a batch `restarts` times from new starts and keep, for every sample, the strongest result.

    Other arguments, results and errors are those of `datamerge.attacks.attack`; `start_loss` is the first start's.
    """

    def once() -> Attacked:
        if isinstance(settings, APGD):
            return apgd(model, clean, target, objective, settings, generators, names, precision=precision)
        return attack(model, clean, target, objective, settings, generators, names, precision=precision)

    best = once()
    for _ in range(restarts - 1):
        other = once()
        stronger = other.loss > best.loss
        pixels = torch.where(stronger.view(-1, 1, 1, 1), other.pixels, best.pixels)
        best = Attacked(pixels, best.start_loss, torch.maximum(other.loss, best.loss))
    return best


def gradient_sign(
    model: nn.Module, pixels: Tensor, target: Tensor, objective: Objective, precision: Precision
) -> Tensor:
    """Sign of the objective's gradient at pixels [B, C, H, W] in [0, 1]."""
    with frozen(model):
        _, gradient = Gradients(model, target, objective, 1.0, precision).at(pixels)
    return gradient.sign()
