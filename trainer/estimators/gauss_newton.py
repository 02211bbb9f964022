"""The paper's estimator: squared input gradients at pseudo-labels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from trainer.data.noise import Draws
from trainer.estimators.base import GroupLoss, Model, check, evaluate
from trainer.losses import Likelihood

Compiled = Callable[[Tensor, Likelihood, list[Tensor]], tuple[Tensor, Tensor]]
"""`outputs_and_diagonal` of a model."""


def gauss_newton(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Likelihood, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """L(x̄, y) + ½ Σ v∘(1/S Σ_s (∇_x L(x̄, ŷ_s))∘²), ŷ_s ~ exp(−L(t, ·))/Z                 (PAPER eq. 9, 10, 16, 17)

    Unbiased for L(x̄, y) + ½ vᵀ diag[GGN_x] (`exact`) with every number of labels S. So is its gradient in θ for the
    squared error, whose labels move with t; for cross entropy the label is held while its law depends on θ, as in the
    paper, which leaves out ½ Σᵢ vᵢ Σₖ (Jₖᵢ − p·Jᵢ)² dpₖ. The standard error falls with 1/√S. Of the group's mean
    loss it leaves out the covariance between pixels, the residual's Hessian (the difference between Hessian and GGN)
    and third and higher orders.

    Cost with S = 1: one forward, an input gradient that keeps its graph, and a backward through both: about 2.3
    plain steps; each further label adds about 1.3. Fused attention has no double backward, hence the math kernel.
    A model that offers `compiled_diagonal`, as `Forward` does, has both passes to the pixels in one compiled graph.

    Args:
        model, mean, variance, target, loss, draws: see `Estimator`.
        samples: S.
    """
    check(model, mean, variance)
    compiled: Compiled | None = getattr(model, "compiled_diagonal", None)
    if compiled is not None:
        like = mean.new_empty(len(mean), model.width)  # type: ignore[attr-defined]  # one with a compiled diagonal has it
        outputs, diagonal = compiled(mean.detach(), loss, [loss.noise(like, draws) for _ in range(samples)])
    else:
        inputs = mean.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            outputs = evaluate(model, inputs)
            diagonal = diagonal_estimate(outputs, inputs, loss, draws, samples)
    correction = 0.5 * (variance * diagonal).flatten(1).sum(dim=1)
    return GroupLoss(loss.value(outputs, target) + correction, correction)


def diagonal_estimate(outputs: Tensor, inputs: Tensor, loss: Likelihood, draws: Draws, samples: int = 1) -> Tensor:
    """diag[GGN_x] of each group, [B, C, H, W], non-negative and differentiable in the parameters.

    Args:
        outputs: model(inputs), [B, K].
        inputs: a tensor that requires grad, [B, C, H, W].
        loss: the loss that is trained on; its `pseudo_label` fixes the scale.
        draws: random numbers, one stream per group.
        samples: labels drawn per group.
    """
    total = torch.zeros_like(inputs)
    for _ in range(samples):
        value = loss.value(outputs, loss.pseudo_label(outputs, loss.noise(outputs, draws))).sum()
        (gradient,) = torch.autograd.grad(value, inputs, create_graph=True)
        total = total + gradient.square()
    return total / samples


def outputs_and_diagonal(
    model: Model, pixels: Tensor, loss: Likelihood, noise: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The outputs, and `diagonal_estimate` from labels of given noise, in a form that torch.compile takes whole.

    A compiled function cannot be differentiated twice; so the first derivative is taken inside, by `torch.func`, and
    the graph that is compiled has been differentiated once already.

    Args:
        model, loss: as there.
        pixels: [B, C, H, W].
        noise: of each label, [B, K].
    """
    with sdpa_kernel(SDPBackend.MATH):
        outputs, backward = torch.func.vjp(lambda points: evaluate(model, points), pixels)  # type: ignore[misc]  # vjp may give a third
        total = torch.zeros_like(pixels)
        for numbers in noise:
            label = loss.pseudo_label(outputs, numbers)
            slope = torch.func.grad(lambda found, label=label: loss.value(found, label).sum())(outputs)
            (gradient,) = backward(slope)
            total = total + gradient.square()
    return outputs, total / len(noise)
