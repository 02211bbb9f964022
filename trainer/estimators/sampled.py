"""The loss at images drawn around the mean: no derivative with respect to pixels, so no double backward."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, check, evaluate
from trainer.losses import Loss


def sampled(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """1/S Σ_s L(x̄ + √v∘z_s, y), z_s ∈ {−1, +1} independent

    Unbiased for the mean loss over the cloud x̄ ± √v, which has the group's mean and variances and no covariance:
    L(x̄) + ½ Σ_i v_i (∇²_x L)_ii and terms of third and higher order, with the full Hessian where the paper has the
    GGN (so it can be negative). For a linear model under squared error and a diagonal covariance: the group's mean
    loss. Its variance contains the first-order term (∇_x L)·(√v∘z), which `antithetic` removes.

    Cost: S plain steps in one batch. Fused kernels, `torch.compile` and bfloat16 all apply; note that bfloat16 rounds
    pixels to 1/256 of their size, which is as coarse as a deviation of 1/255. The images may leave [0, 1] by √v.

    Args:
        model, mean, variance, target, loss, draws: see `Estimator`.
        samples: S.
    """
    return _mean_loss(model, mean, variance, target, loss, draws, samples, mirrored=False)


def antithetic(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """1/S Σ_s ½ (L(x̄ + √v∘z_s, y) + L(x̄ − √v∘z_s, y)), z_s ∈ {−1, +1}                  (Hammersley and Morton 1956)

    Unbiased for the same quantity as `sampled`. In each pair all odd orders cancel, the large first one among them;
    for a loss quadratic in x the pair gives L(x̄) + ½ (√v∘z)ᵀ ∇²_x L (√v∘z) exactly.

    Cost: 2S plain steps in one batch; otherwise as `sampled`.
    """
    return _mean_loss(model, mean, variance, target, loss, draws, samples, mirrored=True)


def _mean_loss(
    model: Model,
    mean: Tensor,
    variance: Tensor,
    target: Tensor,
    loss: Loss,
    draws: Draws,
    samples: int,
    *,
    mirrored: bool,
) -> GroupLoss:
    check(model, mean, variance)
    deviation = variance.sqrt()
    images = []
    for _ in range(samples):
        offset = deviation * draws.signs(mean)
        images += [mean + offset, mean - offset] if mirrored else [mean + offset]
    # The draws of one group lie B rows apart.
    values = loss.value(evaluate(model, torch.cat(images)), torch.cat([target] * len(images)))
    return GroupLoss(values.reshape(len(images), len(mean)).mean(dim=0), None)
