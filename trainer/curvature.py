"""The merged loss: the loss at the mean plus the curvature that the mean leaves out.

    L̂(θ) = L(θ, x̄, y) + ½ Σ v∘diag[GGN_x]                                                     (PAPER eq.
    6, 10, 17)

Both terms use one forward pass at x̄, and both are differentiated with respect to θ (double backward). Nothing
here may mix the rows of a batch: gradients are taken of the sum over rows, which gives each row its own
gradient only if row b of the outputs depends on row b of the inputs alone. (The loop keeps BatchNorm in eval
mode for that reason among others.)

Shapes: B groups, C H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from storage_schemas import ConfigError
from trainer.losses import Loss

# A dense Jacobian of a small model; above this one group alone would fill the memory with its graph.
MAX_DENSE_ENTRIES = 1 << 22

Model = Callable[[Tensor], Tensor]
Curvature = Callable[[Tensor, Tensor, Loss], Tensor]
"""(outputs [B, K], the inputs they were computed from [B, C, H, W], loss) → diag[GGN_x], [B, C, H, W]."""


class GroupLoss(NamedTuple):
    """Loss of each group, correction included, and the correction by itself; both [B]."""

    loss: Tensor
    correction: Tensor


def gauss_newton(
    outputs: Tensor, inputs: Tensor, loss: Loss, *, generator: torch.Generator, samples: int = 1
) -> Tensor:
    """The paper's estimate of diag[GGN_x]: squared input gradients at pseudo-labels (eq. 9, 16).

    Unbiased for every number of labels; its standard error falls with 1/√samples. Each label costs one
    backward pass here and one more when the result is differentiated.

    Args:
        outputs: model(inputs), [B, K].
        inputs: a tensor that requires grad, [B, C, H, W].
        loss: the loss that is trained on; its `pseudo_label` fixes the scale.
        generator: source of the labels.
        samples: labels drawn per group.

    Returns:
        [B, C, H, W], non-negative, differentiable in the model's parameters.
    """
    total = torch.zeros_like(inputs)
    for _ in range(samples):
        label = loss.pseudo_label(outputs.detach(), generator)
        value = loss.value(outputs, label).sum()
        (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
        total = total + gradient.square()
    return total / samples


def exact(outputs: Tensor, inputs: Tensor, loss: Loss) -> Tensor:
    """diag[Jᵀ (∇²_t L) J] from the dense Jacobian, one backward pass per output; for small models.

    Args and returns as `gauss_newton`, without its randomness.

    Raises:
        ConfigError: the Jacobian of one group has more than `MAX_DENSE_ENTRIES` entries.
    """
    width, values = outputs.shape[1], inputs[0].numel()
    if width * values > MAX_DENSE_ENTRIES:
        raise ConfigError(
            f"curvature: `exact` expects at most {MAX_DENSE_ENTRIES} Jacobian entries a group, "
            f"found {width} outputs "
            f'x {values} pixel values; use curvature = "gauss_newton"'
        )
    rows = [torch.autograd.grad(outputs[:, k].sum(), inputs, create_graph=True)[0].flatten(1) for k in range(width)]
    jacobian = torch.stack(rows, dim=1)
    diagonal = (jacobian * (loss.output_hessian(outputs) @ jacobian)).sum(dim=1)
    return diagonal.reshape(inputs.shape)


def merged_loss(
    model: Model, mean: Tensor, variance: Tensor | None, target: Tensor, loss: Loss, curvature: Curvature | None
) -> GroupLoss:
    """Loss of merged groups.

    Args:
        model: [0, 1] pixels [B, C, H, W] → outputs [B, K].
        mean: x̄, [B, C, H, W].
        variance: v, [B, C, H, W]; None without curvature.
        target: what `loss` takes: embeddings [B, K] or class indices [B].
        loss: the loss at one image.
        curvature: an estimate of diag[GGN_x]; None drops the correction (the `mean-only` arm).
    """
    if curvature is None or variance is None:
        value = loss.value(model(mean), target)
        return GroupLoss(value, torch.zeros_like(value))
    inputs = mean.detach().requires_grad_()
    # Fused attention kernels have no double backward; the plain one has.
    with sdpa_kernel(SDPBackend.MATH):
        outputs = model(inputs)
        diagonal = curvature(outputs, inputs, loss)
    correction = 0.5 * (variance * diagonal).flatten(1).sum(dim=1)
    return GroupLoss(loss.value(outputs, target) + correction, correction)


def individual_loss(model: Model, members: Tensor, counts: list[int], target: Tensor, loss: Loss) -> GroupLoss:
    """Ordinary loss of groups, 1/N Σ_i L(x_i, y) (eq. 1): the baseline that merging replaces.

    Args:
        model: [0, 1] pixels [M, C, H, W] → outputs [M, K].
        members: uint8 [M, C, H, W], the members of one group after those of the other.
        counts: members of each group; their sum is M.
        target: one per group, embeddings [B, K] or class indices [B].
        loss: the loss at one image.
    """
    # The parameters' dtype decides nothing here: pixels are float32 multiples of 1/255, as in every other
    # arm.
    outputs = model(members.to(torch.float32) / 255.0)
    repeated = target.repeat_interleave(torch.tensor(counts, device=target.device), dim=0)
    values = loss.value(outputs, repeated)
    mean = torch.stack([group.mean() for group in values.split(counts)])
    return GroupLoss(mean, torch.zeros_like(mean))
