"""The loss at the mean image, without a correction."""

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

    Deterministic and exact for the loss at the mean image; as an estimate of the group's mean loss it leaves out
    ½ tr(C ∇²_x L), with the group's covariance C, and higher orders. Cost: one plain step (1 forward, 1 backward).

    Args:
        model, mean, target, loss: see `Estimator`.
        variance, draws: ignored; they are here for the signature of `Estimator`.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> mean_only(lambda x: x.flatten(1), torch.full((1, 1, 1, 2), 0.5), None, torch.zeros(1, 2), SquaredError())
        GroupLoss(loss=tensor([0.5000]), correction=tensor([0.]))
    """
    value = loss.value(evaluate(model, mean), target)
    return GroupLoss(value, torch.zeros_like(value))
