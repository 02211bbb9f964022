"""Estimators of a group's mean loss from its mean x̄ and variance v, one per file; README.md compares them.

    L̂(θ) = L(θ, x̄, y) + ½ vᵀ diag[GGN_x]                                                       (PAPER eq. 6, 10, 17)

A model must not mix the rows of a batch: estimators differentiate the sum over rows, which gives each row its own
gradient only if row b of the outputs depends on row b of the inputs alone.
"""

from collections.abc import Callable

from trainer.estimators.along_factors import ALONG_FACTORS, along_factors, deviation_along
from trainer.estimators.base import Estimator, GroupLoss, Model, check_batch_norm
from trainer.estimators.gauss_newton import gauss_newton
from trainer.estimators.individual import individual_loss
from trainer.estimators.mean_only import mean_only
from trainer.estimators.sampled import antithetic, sampled

# Estimators of the arm avg, from mean and variance; each takes `samples`.
AROUND_MEAN: dict[str, Callable[..., GroupLoss]] = {
    "gauss_newton": gauss_newton,
    "sampled": sampled,
    "antithetic": antithetic,
}

__all__ = [
    "ALONG_FACTORS",
    "AROUND_MEAN",
    "Estimator",
    "GroupLoss",
    "Model",
    "along_factors",
    "antithetic",
    "check_batch_norm",
    "deviation_along",
    "gauss_newton",
    "individual_loss",
    "mean_only",
    "sampled",
]
