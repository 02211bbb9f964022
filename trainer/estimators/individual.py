"""The baseline that merging replaces: the ordinary loss over the members themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.data.batches import repeated
from trainer.estimators.base import GroupLoss, Model, evaluate
from trainer.losses import Loss


def individual_loss(model: Model, members: Tensor, counts: Sequence[int], target: Tensor, loss: Loss) -> GroupLoss:
    """1/N Σ_i L(θ, x_i, y) of each group                                                                (PAPER eq. 1)

    No randomness. Cost: N plain steps in one batch. Groups may have different N.

    Args:
        model: pixels → outputs.
        members: [M, C, H, W] in [0, 1], the members of one group after those of the other.
        counts: members of each group; their sum is M.
        target: one per group, embeddings [B, K] or class indices [B].
        loss: the loss at one image.
    """
    values = loss.value(evaluate(model, members), repeated(target, counts))
    if len(set(counts)) == 1:
        return GroupLoss(values.view(len(counts), -1).mean(dim=1), None)
    return GroupLoss(torch.stack([group.mean() for group in values.split(list(counts))]), None)
