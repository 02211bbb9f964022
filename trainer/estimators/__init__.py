"""Estimates of the mean loss of a group from its mean x̄ and variance v, one file each; README.md compares them.

    L̂(θ) = L(θ, x̄, y) + ½ vᵀ diag[GGN_x]                                                       (PAPER eq. 6, 10, 17)

Nothing here may mix the rows of a batch: gradients are taken of the sum over rows, which gives each row its own
gradient only if row b of the outputs depends on row b of the inputs alone.
"""

from collections.abc import Callable, Mapping

from trainer.estimators.along_factors import ALONG_FACTORS, along_factors, deviation_along
from trainer.estimators.base import Estimator, GroupLoss, Model, check_batch_norm
from trainer.estimators.exact import exact
from trainer.estimators.gauss_newton import gauss_newton
from trainer.estimators.individual import individual_loss
from trainer.estimators.jvp import jvp
from trainer.estimators.mean_only import mean_only
from trainer.estimators.sampled import antithetic, sampled

# Those that take `samples`; `exact` and `mean_only` draw nothing.
RANDOM: Mapping[str, Callable[..., GroupLoss]] = {
    "gauss_newton": gauss_newton,
    "sampled": sampled,
    "antithetic": antithetic,
    "jvp": jvp,
}
# One backward pass and no derivative in between: what torch.compile can take.
COMPILABLE = ("sampled", "antithetic", "mean_only")

__all__ = [
    "ALONG_FACTORS",
    "COMPILABLE",
    "RANDOM",
    "Estimator",
    "GroupLoss",
    "Model",
    "along_factors",
    "antithetic",
    "check_batch_norm",
    "deviation_along",
    "exact",
    "gauss_newton",
    "individual_loss",
    "jvp",
    "mean_only",
    "sampled",
]
