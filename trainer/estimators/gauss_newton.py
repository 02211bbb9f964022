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
"""`outputs_and_diagonal`, compiled for one model: (pixels, loss, noise) → (outputs, diagonal)."""


def gauss_newton(
    model: Model, mean: Tensor, variance: Tensor, target: Tensor, loss: Likelihood, draws: Draws, *, samples: int = 1
) -> GroupLoss:
    """L(x̄, y) + ½ Σ v∘(1/S Σ_s (∇_x L(x̄, ŷ_s))∘²), ŷ_s ~ exp(−L(t, ·))/Z                 (PAPER eq. 9, 10, 16, 17)

    Unbiased for L(x̄, y) + ½ vᵀ diag[GGN_x] for every number of labels S; the standard error falls as 1/√S. For the
    squared error, whose labels move with t, the gradient in θ is unbiased too. For cross entropy the label is held
    fixed although its distribution depends on θ, as in the paper; this drops ½ Σᵢ vᵢ Σₖ (Jₖᵢ − p·Jᵢ)² dpₖ from the
    gradient. Compared with the group's mean loss, the estimate leaves out the covariance between pixels, the
    difference between the Hessian and the GGN, and terms of third and higher order.

    Cost with S = 1: one forward, an input gradient that keeps its graph, and a backward through both: about 2.3
    plain steps; each further label adds about 1.3. Fused attention has no double backward; the math kernel has. If
    the model has `compiled_diagonal`, as `Forward` does, outputs and diagonal come from one compiled graph.

    Args:
        model, mean, variance, target, loss, draws: see `Estimator`.
        samples: S, labels drawn per group.

    Raises:
        ConfigError: see `Estimator`.

    Examples:
        The exact value is L(x̄) + Σ v = 0.50 + 0.02; more labels come closer to it.

        >>> from trainer.losses import SquaredError
        >>> mean, variance, target = torch.full((1, 1, 1, 2), 0.5), torch.full((1, 1, 1, 2), 0.01), torch.zeros(1, 2)
        >>> arguments = (lambda x: x.flatten(1), mean, variance, target, SquaredError(), Draws([0]))
        >>> loss, correction = gauss_newton(*arguments, samples=1000)
        >>> round(loss.item(), 2), round(correction.item(), 2)
        (0.52, 0.02)
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
    """Unbiased estimate of diag[GGN_x], [B, C, H, W], non-negative and differentiable in the parameters.

    Args:
        outputs: model(inputs), [B, K].
        inputs: a tensor that requires grad, [B, C, H, W].
        loss: the training loss; its `pseudo_label` determines the scale.
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
    """Outputs [B, K] and `diagonal_estimate` [B, C, H, W] in a form that torch.compile turns into one graph.

    A compiled function cannot be differentiated twice. So `torch.func` takes the first derivative inside, and
    autograd differentiates the compiled graph only once.

    Args:
        model: pixels → outputs.
        pixels: [B, C, H, W].
        loss: the training loss.
        noise: random numbers of each of the S labels, as `Likelihood.noise` makes them, [B, K] each.
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
