"""The quantity that `gauss_newton` estimates, from the dense Jacobian: an oracle for small models."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer import CrossEntropy, Draws, GroupLoss, Loss, SquaredError
from trainer.estimators import Model


def exact(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws | None = None
) -> GroupLoss:
    """L(x̄, y) + ½ vᵀ diag[Jᵀ (∇²_t L) J], J = ∂t/∂x                                           (PAPER eq. 6, 10, 17)

    No randomness (`draws` is not used). For a linear model under squared error and a group whose covariance is
    diagonal it equals the group's mean loss (eq. 1). The arguments are those of an `Estimator`.
    """
    inputs = mean.detach().requires_grad_()
    outputs = model(inputs)
    correction = 0.5 * (variance * dense_diagonal(outputs, inputs, loss)).flatten(1).sum(dim=1)
    return GroupLoss(loss.value(outputs, target) + correction, correction)


def dense_diagonal(outputs: Tensor, inputs: Tensor, loss: Loss) -> Tensor:
    """diag[Jᵀ (∇²_t L) J] of each group, [B, C, H, W], by one backward pass per output.

    The arguments are those of `diagonal_estimate` in `gauss_newton`.
    """
    rows = [
        torch.autograd.grad(outputs[:, k].sum(), inputs, create_graph=True)[0].flatten(1)
        for k in range(outputs.shape[1])
    ]
    jacobian = torch.stack(rows, dim=1)
    diagonal = (jacobian * (output_hessian(loss, outputs) @ jacobian)).sum(dim=1)
    return diagonal.reshape(inputs.shape)


def output_hessian(loss: Loss, outputs: Tensor) -> Tensor:
    """∇²_t L of each row, [B, K, K]."""
    if isinstance(loss, SquaredError):
        return 2.0 * loss.scale * torch.eye(outputs.shape[1], dtype=outputs.dtype).expand(len(outputs), -1, -1)
    assert isinstance(loss, CrossEntropy)
    probabilities = outputs.softmax(dim=1)
    return torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
