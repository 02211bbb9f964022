"""The loss at images drawn along stored directions of the group's covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.draws import Draws
from trainer.estimators.base import GroupLoss, Model, evaluate
from trainer.losses import Loss


def along_factors(
    model: Model,
    mean: Tensor,
    factors: Tensor,
    target: Tensor,
    loss: Loss,
    draws: Draws,
    *,
    samples: int = 1,
    deviation: float = 1.0,
) -> GroupLoss:
    """1/S Σ_s L(x̄ + d·Σ_j z_sj F_j, y), z_sj ∈ {−1, +1} independent, Σ_j F_j F_jᵀ ≈ C

    Unbiased for the mean loss over the 2ᵏ points x̄ ± d F_1 … ± d F_k. They have the group's mean and, with d = 1, the
    covariance that its factors keep: L(x̄) + ½ tr(C ∇²_x L) and terms of third and higher order. `sampled` has the
    diagonal of C instead, in which deviations that an attack aligned cancel. For a linear model under squared error
    and factors with Σ_j F_j F_jᵀ = C: the group's mean loss, whatever C.

    Cost: S plain steps in one batch. Fused kernels, `torch.compile` and bfloat16 all apply.
    The images may leave [0, 1].

    Args:
        model, mean, target, loss, draws: see `Estimator`.
        factors: F, float32 or float64 [B, k, C, H, W].
        samples: S.
        deviation: d; more than 1 trains on stronger perturbations than were found.
    """
    images = []
    for _ in range(samples):
        signs = draws.signs(mean.new_empty(factors.shape[:2]))
        images.append(mean + deviation * torch.einsum("bk,bkchw->bchw", signs, factors))
    values = loss.value(evaluate(model, torch.cat(images)), torch.cat([target] * samples))
    return GroupLoss(values.reshape(samples, len(mean)).mean(dim=0), None)
