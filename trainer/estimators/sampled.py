"""The mean loss at images drawn around the mean; it needs no input gradient and so no double backward."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, check, evaluate
from trainer.losses import Loss


def sampled(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """1/S Σ_s L(x̄ + √v∘z_s, y), with independent signs z_s ∈ {−1, +1} for every pixel

    Unbiased for the mean loss over the points x̄ ± √v, which have the group's mean and variances but no covariance:
    L(x̄) + ½ Σ_i v_i (∇²_x L)_ii plus terms of third and higher order. The Hessian takes the place of the paper's GGN,
    so the second-order term can be negative. For a linear model under squared error and a diagonal covariance it is
    unbiased for the group's mean loss. The first-order term (∇_x L)·(√v∘z) adds noise, which `antithetic` removes.

    Cost: S plain steps in one batch. Fused kernels, `torch.compile` and bfloat16 all apply; but bfloat16 has a
    relative precision of 1/256, as coarse as a deviation of 1/255. The images may leave [0, 1] by up to √v.

    Args:
        model, mean, variance, target, loss, draws: see `Estimator`.
        samples: S, images drawn per group.

    Raises:
        ConfigError: see `Estimator`.

    Examples:
        One draw has the loss 0.72, 0.52 or 0.32; the mean of many comes close to L(x̄) + Σ v = 0.52.

        >>> from trainer.losses import SquaredError
        >>> mean, variance, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.01), torch.zeros(1, 2)
        >>> arguments = (lambda x: x.flatten(1), mean, variance, target, SquaredError(), Draws([0]))
        >>> abs(float(sampled(*arguments, samples=4000).loss) - 0.52) < 0.01
        True
    """
    return _mean_loss(model, mean, variance, target, loss, draws, samples, mirrored=False)


def antithetic(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """1/S Σ_s ½ (L(x̄ + √v∘z_s, y) + L(x̄ − √v∘z_s, y)), z_s ∈ {−1, +1}                  (Hammersley and Morton 1956)

    Unbiased for the same quantity as `sampled`, with less noise: in each pair all odd orders cancel, including the
    large first one. For a loss quadratic in x a pair gives exactly L(x̄) + ½ (√v∘z)ᵀ ∇²_x L (√v∘z).

    Cost: 2S plain steps in one batch. Arguments and errors as in `sampled`.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> mean, variance, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.01), torch.zeros(1, 2)
        >>> antithetic(lambda x: x.flatten(1), mean, variance, target, SquaredError(), Draws([0])).loss
        tensor([0.5200])
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
    # Images are ordered sample by sample, so the rows of one group are B apart.
    values = loss.value(evaluate(model, torch.cat(images)), torch.cat([target] * len(images)))
    return GroupLoss(values.reshape(len(images), len(mean)).mean(dim=0), None)
