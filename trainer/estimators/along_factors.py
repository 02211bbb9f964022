"""Estimators from the mean and the stored factors F_j of a group's covariance C, including its off-diagonal part.

They evaluate the model at x̄ + u, where the deviation u = d·Σ_j z_j F_j with independent signs z_j ∈ {−1, +1} has
the covariance d² Σ_j F_j F_jᵀ ≈ d² C. The scale d = 1 keeps the covariance of the group; d > 1 trains on stronger
perturbations than the attack produced. No estimator here needs a double backward, so fused kernels, `torch.compile`
and bfloat16 all apply. The images may leave [0, 1].

Shapes: B groups, k factors, C H W pixels, K outputs, S samples.
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

    Unbiased for the mean loss over the 2ᵏ points x̄ ± d F_1 … ± d F_k. With d = 1 these points have the group's mean
    and the covariance of its factors, so the expectation is L(x̄) + ½ tr(C ∇²_x L) plus terms of third and higher
    order. `sampled` uses only the diagonal of C, which ignores that an attack moves many pixels together. For a
    linear model under squared error, and factors with Σ_j F_j F_jᵀ = C, it is unbiased for the group's mean loss.

    Cost: S plain steps in one batch.

    Args:
        model, mean, target, loss: see `Estimator`.
        deviations: S tensors u_s [B, C, H, W], as `deviation_along` draws them.

    Examples:
        The members of the group are x̄ ± u; their losses are 0.72 and 0.32.

        >>> from trainer.losses import SquaredError
        >>> mean, u, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.1), torch.zeros(1, 2)
        >>> sampled_along_factors(lambda x: x.flatten(1), mean, target, SquaredError(), [u]).loss
        tensor([0.7200])
    """
    return _mean_loss(model, [mean + offset for offset in deviations], target, loss)


def antithetic_along_factors(
    model: Model, mean: Tensor, target: Tensor, loss: Loss, deviations: list[Tensor]
) -> GroupLoss:
    """1/S Σ_s ½ (L(x̄ + u_s, y) + L(x̄ − u_s, y))                                         (Hammersley and Morton 1956)

    Unbiased for the same quantity as `sampled_along_factors`; with k = 1 it equals that quantity, without noise.

    Cost: 2S plain steps in one batch. Arguments as in `sampled_along_factors`.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> mean, u, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.1), torch.zeros(1, 2)
        >>> antithetic_along_factors(lambda x: x.flatten(1), mean, target, SquaredError(), [u]).loss
        tensor([0.5200])
    """
    return _mean_loss(
        model, [image for offset in deviations for image in (mean + offset, mean - offset)], target, loss
    )


def gauss_newton_along_factors(
    model: Model, mean: Tensor, target: Tensor, loss: Likelihood, deviations: list[Tensor]
) -> GroupLoss:
    """L(x̄, y) + 1/S Σ_s ½ Δ_sᵀ (∇²_t L) Δ_s,  Δ_s = f(x̄ + u_s) − f(x̄)

    PAPER eq. 6 with the whole covariance C in place of its diagonal. Δ approximates J u, J = ∂f/∂x, by a finite
    difference whose step is the deviation itself, so that E[½ Δᵀ (∇²_t L) Δ] ≈ ½ tr(GGN C). For a linear model
    Δ = J u exactly; for other models Δ is the network's response at the distance of the members, not its
    linearisation.

    Cost: S + 1 plain steps in one batch. Arguments as in `sampled_along_factors`.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> mean, u, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.1), torch.zeros(1, 2)
        >>> gauss_newton_along_factors(lambda x: x.flatten(1), mean, target, SquaredError(), [u])
        GroupLoss(loss=tensor([0.5200]), correction=tensor([0.0200]))
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
    """Apply an estimator of `ALONG_FACTORS` to random deviations u of each group.

    Args:
        model, mean, target, loss, draws: see `Estimator`.
        factors: F, float32 or float64 [B, k, C, H, W].
        estimator: name in `ALONG_FACTORS`.
        samples: S, deviations drawn per group.
        deviation: d, scale of the deviations.

    Raises:
        KeyError: `ALONG_FACTORS` has no such estimator.

    Examples:
        >>> from trainer.losses import SquaredError
        >>> mean, factors, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 1, 2), 0.1), torch.zeros(1, 2)
        >>> arguments = (lambda x: x.flatten(1), mean, factors, target, SquaredError(), Draws([0]))
        >>> along_factors(*arguments, estimator="antithetic").loss
        tensor([0.5200])
        >>> along_factors(*arguments, estimator="antithetic", deviation=2.0).loss
        tensor([0.5800])
    """
    deviations = [deviation_along(factors, draws, deviation) for _ in range(samples)]
    return ALONG_FACTORS[estimator](model, mean, target, loss, deviations)


def deviation_along(factors: Tensor, draws: Draws, deviation: float = 1.0) -> Tensor:
    """Draw u = d·Σ_j z_j F_j for each group, [B, C, H, W]; arguments as in `along_factors`."""
    signs = draws.signs(factors.new_empty(factors.shape[:2]))
    return deviation * torch.einsum("bk,bkchw->bchw", signs, factors)


def _mean_loss(model: Model, images: list[Tensor], target: Tensor, loss: Loss) -> GroupLoss:
    values = loss.value(evaluate(model, torch.cat(images)), torch.cat([target] * len(images)))
    return GroupLoss(values.reshape(len(images), -1).mean(dim=0), None)
