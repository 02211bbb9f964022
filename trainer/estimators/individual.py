"""The ordinary mean loss over the stored members: the baseline that merging replaces."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.batches import repeated
from trainer.estimators.base import GroupLoss, Model, evaluate
from trainer.losses import Loss


def individual_loss(model: Model, members: Tensor, counts: Sequence[int], target: Tensor, loss: Loss) -> GroupLoss:
    """1/N Σ_i L(θ, x_i, y) of each group                                                                (PAPER eq. 1)

    Deterministic. Cost: N plain steps in one batch. Groups may differ in N.

    Args:
        model: pixels [M, C, H, W] in [0, 1] → outputs [M, K].
        members: [M, C, H, W] in [0, 1], the members of the first group, then those of the second, and so on.
        counts: number of members of each group; their sum is M.
        target: one per group, embeddings [B, K] or class indices int64 [B].
        loss: the loss at one image.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> members, target = torch.tensor([0.4, 0.6]).reshape(2, 1, 1, 1).expand(2, 1, 1, 2), torch.zeros(1, 2)
        >>> individual_loss(lambda x: x.flatten(1), members, [2], target, SquaredError()).loss
        tensor([0.5200])
    """
    values = loss.value(evaluate(model, members), repeated(target, counts))
    if len(set(counts)) == 1:
        return GroupLoss(values.view(len(counts), -1).mean(dim=1), None)
    return GroupLoss(torch.stack([group.mean() for group in values.split(list(counts))]), None)
