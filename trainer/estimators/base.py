"""The signature and the result of estimators, and the checks of their model and moments.

Shapes: B groups, C H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from storage_schemas import ConfigError
from trainer.data.noise import Draws
from trainer.losses import Likelihood

Model = Callable[[Tensor], Tensor]
"""[0, 1] pixels [B, C, H, W] → outputs [B, K]; row b of the outputs depends on row b of the pixels alone."""


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GroupLoss(NamedTuple):
    """Result of an estimator.

    Attributes:
        loss: L̂ of each group, correction included, [B], differentiable in the model's parameters.
        correction: L̂ − L(x̄), [B]; None if the estimator does not evaluate L(x̄).
    """

    loss: Tensor
    correction: Tensor | None


class Estimator(Protocol):
    """Estimates the mean loss of merged groups from their mean and variance."""

    def __call__(
        self, model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Likelihood, draws: Draws
    ) -> GroupLoss:
        """Estimate the mean loss of each group.

        Args:
            model: pixels [B, C, H, W] in [0, 1] → outputs [B, K].
            mean: x̄, float32 or float64 [B, C, H, W].
            variance: v with divisor N, dtype and shape of the mean.
            target: embeddings [B, K] or class indices int64 [B], whichever `loss` takes.
            loss: the loss at one image; estimators that do not use its curvature accept any `Loss`.
            draws: random numbers, one stream per group.

        Raises:
            ConfigError: the model mixes the rows of a batch, or the moments are in half precision.
        """


def evaluate(model: Model, pixels: Tensor) -> Tensor:
    """Outputs of a model, [B, K], in at least float32: losses and corrections are never computed in bfloat16."""
    outputs = model(pixels)
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def check(model: Model, mean: Tensor, variance: Tensor) -> None:
    """Refuse inputs for which an estimator would silently return a wrong number.

    Raises:
        ConfigError: see `Estimator`.
    """
    for name, moment in (("mean", mean), ("variance", variance)):
        if moment.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{name}: expected float32 or float64, found {str(moment.dtype).removeprefix('torch.')}, which is "
                "too coarse for small variances; keep moments in float32 (autocast casts inside the model)"
            )
    if isinstance(model, nn.Module):
        check_batch_norm(model)


def check_batch_norm(model: nn.Module) -> None:
    """Refuse BatchNorm in training mode.

    In training mode a group's outputs depend on the other groups of the batch, so the gradient of the summed loss
    with respect to the group's pixels is not the gradient of the group's loss, and the estimated curvature is
    meaningless.

    Raises:
        ConfigError: a BatchNorm layer is in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.training:
            raise ConfigError(
                f"{name or type(module).__name__}: expected BatchNorm in eval mode, found it in training mode, "
                "which mixes the groups of a batch and makes each group's input gradient wrong; call .eval() on it"
            )
