"""The loss along stored directions of a group's covariance: what a diagonal variance leaves out.

Everywhere d·Σ_j z_j F_j with z_j ∈ {−1, +1} independent is a deviation u from the mean, whose covariance is that of
the factors, d² Σ_j F_j F_jᵀ ≈ d² C. d = 1 keeps the group's; more trains on stronger perturbations than were found.
None needs a double backward, so fused kernels, `torch.compile` and bfloat16 all apply. Images may leave [0, 1].

Shapes: B groups, k factors, C H W pixels, S samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, evaluate
from trainer.losses import Likelihood, Loss


def sampled_along_factors(
    model: Model, mean: Tensor, target: Tensor, loss: Loss, deviations: list[Tensor]
) -> GroupLoss:
    """1/S Σ_s L(x̄ + u_s, y)

    Unbiased for the mean loss over the 2ᵏ points x̄ ± d F_1 … ± d F_k. They have the group's mean and, with d = 1, the
    covariance that its factors keep: L(x̄) + ½ tr(C ∇²_x L) and terms of third and higher order. `sampled` has the
    diagonal of C instead, in which deviations that an attack aligned cancel. For a linear model under squared error
    and factors with Σ_j F_j F_jᵀ = C: the group's mean loss, whatever C.

    Cost: S plain steps in one batch.
    """
    return _mean_loss(model, [mean + offset for offset in deviations], target, loss)


def antithetic_along_factors(
    model: Model, mean: Tensor, target: Tensor, loss: Loss, deviations: list[Tensor]
) -> GroupLoss:
    """1/S Σ_s ½ (L(x̄ + u_s, y) + L(x̄ − u_s, y))                                         (Hammersley and Morton 1956)

    Unbiased for the same as `sampled_along_factors`; with k = 1 it is that mean itself, without noise.

    Cost: 2S plain steps in one batch.
    """
    return _mean_loss(
        model, [image for offset in deviations for image in (mean + offset, mean - offset)], target, loss
    )


def gauss_newton_along_factors(
    model: Model, mean: Tensor, target: Tensor, loss: Likelihood, deviations: list[Tensor]
) -> GroupLoss:
    """L(x̄, y) + 1/S Σ_s ½ Δ_sᵀ (∇²_t L) Δ_s,  Δ_s = f(x̄ + u_s) − f(x̄)

    PAPER eq. 6 with the whole covariance in place of its diagonal: Δ is J u by a finite difference of the length of
    the deviation itself, so that E[½ Δᵀ H Δ] ≈ ½ tr(GGN C). The difference is exact for a linear model; for others it
    sees the network's response at the distance where the members are, and not the tangent's.

    Cost: S + 1 plain steps in one batch.
    """
    outputs = evaluate(model, torch.cat([mean, *(mean + offset for offset in deviations)]))
    centre, *ends = outputs.split(len(mean))
    forms = [loss.quadratic_form(centre, end - centre) for end in ends]
    correction = 0.5 * torch.stack(forms).mean(dim=0)
    return GroupLoss(loss.value(centre, target) + correction, correction)


ALONG_FACTORS: Mapping[str, Callable[..., GroupLoss]] = {
    "sampled": sampled_along_factors,
    "antithetic": antithetic_along_factors,
    "gauss_newton": gauss_newton_along_factors,
}


def along_factors(
    model: Model,
    mean: Tensor,
    factors: Tensor,
    target: Tensor,
    loss: Loss,
    draws: Draws,
    *,
    estimator: str = "sampled",
    samples: int = 1,
    deviation: float = 1.0,
) -> GroupLoss:
    """One of `ALONG_FACTORS`, at deviations drawn for each group.

    Args:
        model, mean, target, loss, draws: see `Estimator`.
        factors: F, float32 or float64 [B, k, C, H, W].
        estimator: name in `ALONG_FACTORS`.
        samples: S.
        deviation: d.
    """
    deviations = [deviation_along(factors, draws, deviation) for _ in range(samples)]
    return ALONG_FACTORS[estimator](model, mean, target, loss, deviations)


def deviation_along(factors: Tensor, draws: Draws, deviation: float = 1.0) -> Tensor:
    """u = d·Σ_j z_j F_j of each group, [B, C, H, W]; arguments as in `along_factors`."""
    signs = draws.signs(factors.new_empty(factors.shape[:2]))
    return deviation * torch.einsum("bk,bkchw->bchw", signs, factors)


def _mean_loss(model: Model, images: list[Tensor], target: Tensor, loss: Loss) -> GroupLoss:
    values = loss.value(evaluate(model, torch.cat(images)), torch.cat([target] * len(images)))
    return GroupLoss(values.reshape(len(images), -1).mean(dim=0), None)
