"""No correction: the loss at the mean."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, evaluate
from trainer.losses import Loss


def mean_only(
    model: Model, mean: Tensor, variance: Tensor | None, target: Tensor, loss: Loss, draws: Draws | None = None
) -> GroupLoss:
    """L(θ, x̄, y): the first term of PAPER eq. 6 alone.

    Unbiased for the loss at the mean image; of the group's mean loss it leaves out ½ tr(Σ ∇²_x L) and higher orders.
    No variance. Cost: a plain step (1 forward, 1 backward). Neither `variance` nor `draws` is used.
    """
    value = loss.value(evaluate(model, mean), target)
    return GroupLoss(value, torch.zeros_like(value))
