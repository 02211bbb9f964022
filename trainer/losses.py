"""Losses of a batch, and the random labels from which their curvature is estimated.

A `Likelihood` is the negative logarithm of a density p(y | t) ∝ exp(−L(t, y)) over labels y given the outputs t,
with a Hessian in t that the label does not enter: it equals the Fisher matrix E_{ŷ~p}[∇_t L(t, ŷ) ∇_t L(t, ŷ)ᵀ], so

    diag[GGN_x] = diag[Jᵀ (∇²_t L) J] = E_{ŷ~p}[ (∇_x L(t, ŷ))∘² ]      with J = ∂t/∂x      (PAPER eq. 9, 16)

One formula serves them all, provided that the label is drawn from the density of *the same* loss:

    loss                 p(y | t)             ∇²_t L             label drawn
    c·‖t − y‖²           N(t, I/2c)           2c·I               t + ε/√(2c), ε ~ N(0, I)
    cross entropy        softmax(t)           diag(p) − p pᵀ     class ŷ ~ softmax(t)

That settles the scale trap of the paper: eq. 11 trains on ‖·‖² (c = 1) while Appendix A derives its
correction for ½‖·‖² (c = ½). With ε drawn at unit variance and c = 1 the squared gradient would be
4·diag(JᵀJ) and not the 2·diag(JᵀJ) that belongs to it; here the variance of the label follows from c and
nothing is left to get wrong.

`Cosine` is none: its Hessian depends on the label, and, since the loss is constant along t, has a negative eigenvalue
wherever the gradient is not 0.

Shapes: B groups, K outputs (embedding dimensions or classes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import functional

from trainer.data.noise import Draws

LossName = Literal["squared_error", "cosine", "cross_entropy"]


class Loss(Protocol):
    """What is trained on, and what steps of an attack increase."""

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss of each row: outputs [B, K] → [B]."""


class Likelihood(Loss, Protocol):
    """What the estimators with a Gauss-Newton term need to know of a loss besides."""

    def noise(self, like: Tensor, draws: Draws) -> Tensor:
        """The random numbers of a label, of the shape of outputs."""

    def pseudo_label(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """A label from exp(−loss)/Z for each row, made with such numbers; no gradient flows through the draw."""

    def quadratic_form(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """uᵀ (∇²_t L) u of each row, [B], for tangents u [B, K]; the label does not enter it."""


@dataclass(frozen=True, slots=True)
class SquaredError:
    """scale · ‖t − y‖², summed over the K outputs (never averaged).

    Attributes:
        scale: 1.0 for the loss of PAPER eq. 11 (and FARE), 0.5 for that of Appendix A.

    Examples:
        >>> import torch
        >>> SquaredError().value(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2))
        tensor([25.])
    """

    scale: float = 1.0

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        return self.scale * (outputs - target).square().sum(dim=1)

    def noise(self, like: Tensor, draws: Draws) -> Tensor:
        return draws.normal(like)

    def pseudo_label(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return outputs.detach() + noise / math.sqrt(2.0 * self.scale)

    def quadratic_form(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        return 2.0 * self.scale * tangents.square().sum(dim=1)


@dataclass(frozen=True, slots=True)
class Cosine:
    """1 − cos(t, y), the angle alone: the length of t is free.

    Sim-CLIP (Hossain and Imteaj 2024, arXiv:2407.14971) trains on −cos(f(x'), stopgrad f(x)), symmetrised, with
    the tuned encoder on both sides in the paper and the frozen one on the clean side in its published script. Here y
    is the stored embedding f₀(x) of the frozen encoder, a constant: the other half has no gradient.

    Examples:
        >>> import torch
        >>> Cosine().value(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([1., 0.])
    """

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        # The same number as 1 − cos, without its cancellation where the two are nearly parallel, as at the start.
        between = functional.normalize(outputs, dim=1) - functional.normalize(target, dim=1)
        return 0.5 * between.square().sum(dim=1)


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """−log softmax(t)[y] for class indices y, int64 [B]."""

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, target, reduction="none")

    def noise(self, like: Tensor, draws: Draws) -> Tensor:
        return draws.exponential(like)

    def pseudo_label(self, outputs: Tensor, noise: Tensor) -> Tensor:
        # The class whose exponential clock of rate p_k rings first.
        return (outputs.detach() - noise.log()).argmax(dim=1)

    def quadratic_form(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        centred = tangents - (probabilities * tangents).sum(dim=1, keepdim=True)
        return (probabilities * centred.square()).sum(dim=1)


def loss_of(name: LossName, scale: float = 1.0) -> Loss:
    """The loss of a name.

    Args:
        name: which.
        scale: of the squared error; the others have none.
    """
    if name == "squared_error":
        return SquaredError(scale)
    return Cosine() if name == "cosine" else CrossEntropy()
