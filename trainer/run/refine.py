"""Stored attacks brought up to date: a step or two against the encoder as it is, from where the stored attack ended.

    x ← Π[x + α·sign ∇_x L(f_θ(x), y)],   Π onto ‖x − x_clean‖∞ ≤ ε and [0, 1]

Stored members were made for the encoder that training started from. A step of PGD that starts at one of them costs a
forward pass and an input-only backward pass; PGD from a random start, as in online FARE, needs many of them to get as
far. Needs the clean images in the artifact (`keep_clean` of a merge).

Shapes: B images, C H W pixels, K outputs.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamerge.attacks import Ball, ascend, frozen
from trainer.estimators.base import Model, evaluate
from trainer.losses import Loss


class Refinement(NamedTuple):
    """Settings of further PGD steps on stored attacks.

    Attributes:
        steps: gradient steps.
        step_size: α, in the pixel range [0, 1].
        epsilon: radius of the ball around the clean image, likewise.
    """

    steps: int
    step_size: float
    epsilon: float


def refine(model: Model, points: Tensor, clean: Tensor, target: Tensor, loss: Loss, how: Refinement) -> Tensor:
    """The points after `how.steps` steps of PGD, float32 [B, C, H, W]; parameters get no gradient.

    An attack from a given start, off the 8-bit grid, of which no final loss is taken. Cost: `how.steps` forward and
    input-only backward passes, 2/3 of a plain step each.

    Args:
        model: pixels → outputs.
        points: where to start, float32 [B, C, H, W]; projected first, since a mean plus a factor may lie outside.
        clean: centres of the balls, float32 [B, C, H, W] in [0, 1].
        target: what `loss` takes, one per point.
        loss: to be increased.
        how: settings.
    """

    def at(points: Tensor) -> tuple[Tensor, Tensor]:
        pixels = points.detach().requires_grad_()
        losses = loss.value(evaluate(model, pixels), target)
        (gradient,) = torch.autograd.grad(losses.sum(), pixels)
        return losses.detach(), gradient

    lower, upper = (clean - how.epsilon).clamp_(min=0), (clean + how.epsilon).clamp_(max=1)
    ball = Ball(lower, upper, clean, scale=1.0, grid=False)
    refined = torch.clamp(points, lower, upper)
    # A compiled backward pass is one piece, and computes what is not asked for: gradients of all that could have one.
    with frozen(model) if isinstance(model, nn.Module) else nullcontext():
        ascend(ball, at, refined, how.step_size, how.steps)
    return refined
