"""What `gauss_newton` and `jvp` estimate, from the dense Jacobian; for small models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from storage_schemas import ConfigError
from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, check, evaluate
from trainer.losses import Loss

# Above this many entries the graph of one group's Jacobian alone would fill the memory.
MAX_DENSE_ENTRIES = 1 << 22


def exact(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Loss, draws: Draws | None = None
) -> GroupLoss:
    """L(x̄, y) + ½ vᵀ diag[Jᵀ (∇²_t L) J], J = ∂t/∂x                                           (PAPER eq. 6, 10, 17)

    No randomness (`draws` is not used). For a linear model under squared error and a group whose covariance is
    diagonal it equals the group's mean loss (eq. 1). Cost: 1 forward and K input gradients that keep their graph,
    then a backward through all of them.

    Raises:
        ConfigError: as `Estimator`, and where the Jacobian of one group has more than `MAX_DENSE_ENTRIES` entries.
    """
    check(model, mean, variance)
    inputs = mean.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        outputs = evaluate(model, inputs)
        diagonal = dense_diagonal(outputs, inputs, loss)
    correction = 0.5 * (variance * diagonal).flatten(1).sum(dim=1)
    return GroupLoss(loss.value(outputs, target) + correction, correction)


def dense_diagonal(outputs: Tensor, inputs: Tensor, loss: Loss) -> Tensor:
    """diag[Jᵀ (∇²_t L) J] of each group, [B, C, H, W], by one backward pass per output.

    Arguments as `diagonal_estimate` of `gauss_newton`.
    """
    width, values = outputs.shape[1], inputs[0].numel()
    if width * values > MAX_DENSE_ENTRIES:
        raise ConfigError(
            f"estimator: exact expects at most {MAX_DENSE_ENTRIES} Jacobian entries a group, found {width} outputs x "
            f'{values} pixel values; use estimator = "gauss_newton"'
        )
    rows = [torch.autograd.grad(outputs[:, k].sum(), inputs, create_graph=True)[0].flatten(1) for k in range(width)]
    jacobian = torch.stack(rows, dim=1)
    diagonal = (jacobian * (loss.output_hessian(outputs) @ jacobian)).sum(dim=1)
    return diagonal.reshape(inputs.shape)
