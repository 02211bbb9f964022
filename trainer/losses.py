"""Training losses, and the pseudo-labels from which their curvature is estimated.

A `Likelihood` is the negative logarithm of a density p(y | t) ∝ exp(−L(t, y)) over labels y given the outputs t,
with a Hessian in t that does not depend on the label. It equals the Fisher matrix
E_{ŷ~p}[∇_t L(t, ŷ) ∇_t L(t, ŷ)ᵀ], so

    diag[GGN_x] = diag[Jᵀ (∇²_t L) J] = E_{ŷ~p}[ (∇_x L(t, ŷ))∘² ]      with J = ∂t/∂x      (PAPER eq. 9, 16)

The formula holds for every likelihood, provided that the label is drawn from the density of *the same* loss:

    loss                 p(y | t)             ∇²_t L             label drawn
    c·‖t − y‖²           N(t, I/2c)           2c·I               t + ε/√(2c), ε ~ N(0, I)
    cross entropy        softmax(t)           diag(p) − p pᵀ     class ŷ ~ softmax(t)

The paper uses two scales: eq. 11 trains on ‖·‖² (c = 1), while Appendix A derives its correction for ½‖·‖² (c = ½).
With c = 1 and ε of unit variance the squared gradient would be 4·diag(JᵀJ) instead of the correct 2·diag(JᵀJ). Here
the variance of the label follows from c.

`Cosine` is not a likelihood: its Hessian depends on the label and, since the loss is constant along t, has a negative
eigenvalue wherever the gradient is not 0.

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
    """A loss of each row of a batch, which training minimises and attacks maximise."""

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Loss of each row, [B].

        Args:
            outputs: t, [B, K].
            target: y, embeddings [B, K] or class indices int64 [B].
        """


class Likelihood(Loss, Protocol):
    """A loss that is a negative log-likelihood, as estimators with a Gauss-Newton term need."""

    def noise(self, like: Tensor, draws: Draws) -> Tensor:
        """Random numbers from which `pseudo_label` makes labels, with the shape of outputs, [B, K].

        Args:
            like: a tensor with the shape, dtype and device of the outputs.
            draws: random numbers, one stream per group.
        """

    def pseudo_label(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """Draw a label ŷ ~ exp(−L(t, ·))/Z for each row; no gradient flows through the draw.

        Args:
            outputs: t, [B, K].
            noise: the result of `noise`.
        """

    def quadratic_form(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        """uᵀ (∇²_t L) u of each row, [B], for outputs t [B, K] and tangents u [B, K]."""


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
    """1 − cos(t, y), which does not depend on the length of t.

    Sim-CLIP (Hossain and Imteaj 2024, arXiv:2407.14971) trains on −cos(f(x'), stopgrad f(x)), symmetrised, with
    the tuned encoder on both sides in the paper and the frozen one on the clean side in its published script. Here y
    is the stored embedding f₀(x) of the frozen encoder, a constant, so the symmetric half would have no gradient.

    Examples:
        >>> import torch
        >>> Cosine().value(torch.tensor([[0.0, 3.0], [2.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0]]))
        tensor([1., 0.])
    """

    def value(self, outputs: Tensor, target: Tensor) -> Tensor:
        # Equal to 1 − cos, but without cancellation for nearly parallel vectors, as at the start of training.
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
        # argmin of Exp(1)/p_k is distributed as softmax(t): the exponential race, or Gumbel-max trick.
        return (outputs.detach() - noise.log()).argmax(dim=1)

    def quadratic_form(self, outputs: Tensor, tangents: Tensor) -> Tensor:
        probabilities = outputs.softmax(dim=1)
        centred = tangents - (probabilities * tangents).sum(dim=1, keepdim=True)
        return (probabilities * centred.square()).sum(dim=1)


def loss_of(name: LossName, scale: float = 1.0) -> Loss:
    """Construct a loss by name.

    Args:
        name: name of the loss.
        scale: factor of the squared error; the other losses ignore it.
    """
    if name == "squared_error":
        return SquaredError(scale)
    return Cosine() if name == "cosine" else CrossEntropy()
