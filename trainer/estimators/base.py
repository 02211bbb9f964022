"""What all estimators share: their signature, their result, and what they demand of a model and of moments.

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
    """What an estimator returns.

    Attributes:
        loss: L̂ of each group, correction included, [B], differentiable in the model's parameters.
        correction: its part beyond L(x̄), [B]; None where the estimator never evaluates L(x̄).
    """

    loss: Tensor
    correction: Tensor | None


class Estimator(Protocol):
    """An estimate of the mean loss of merged groups from their mean and variance."""

    def __call__(
        self, model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Likelihood, draws: Draws
    ) -> GroupLoss:
        """Estimate.

        Args:
            model: pixels → outputs.
            mean: x̄, float32 or float64 [B, C, H, W].
            variance: v with divisor N, likewise.
            target: what `loss` takes: embeddings [B, K] or class indices [B].
            loss: the loss at one image; where no curvature of it is taken, any `Loss`.
            draws: random numbers, one stream per group.

        Raises:
            ConfigError: a model that mixes the rows of a batch, or moments in half precision.
        """


def evaluate(model: Model, pixels: Tensor) -> Tensor:
    """Outputs in at least float32: under autocast only the model's inside is bfloat16, no loss or correction is."""
    outputs = model(pixels)
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def check(model: Model, mean: Tensor, variance: Tensor) -> None:
    """Refuse what would give a wrong number without an error.

    Raises:
        ConfigError: see `Estimator`.
    """
    for name, moment in (("mean", mean), ("variance", variance)):
        if moment.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"{name}: expected float32 or float64, found {str(moment.dtype).removeprefix('torch.')}, in "
                "which the difference of nearly equal numbers is noise; keep moments in float32 (autocast casts "
                "inside the model)"
            )
    if isinstance(model, nn.Module):
        check_batch_norm(model)


def check_batch_norm(model: nn.Module) -> None:
    """Raises ConfigError for BatchNorm in training mode.

    There every group's outputs depend on the other groups of the batch: the gradient of the summed loss with
    respect to a group's pixels is then not that of its own loss, and the curvature estimated from it is that of
    no group at all.
    """
    for name, module in model.named_modules():
        if isinstance(module, BATCH_NORMS) and module.training:
            raise ConfigError(
                f"{name or type(module).__name__}: expected BatchNorm in eval mode, found it in training mode, "
                "where it mixes the groups of a batch and each group's input gradient is wrong; call .eval() on it"
            )
