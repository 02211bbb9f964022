"""PGD steps against the current encoder, from a stored adversarial image or from the clean image.

    x ← x_stored + r·U(−1, 1);   x ← Π[x + α·sign ∇_x L(f_θ(x), y)],   Π onto ‖x − x_clean‖∞ ≤ ε and [0, 1]

From the clean image with r = ε this is the attack of online adversarial training (Madry et al. 2018): with ten steps
it is FARE (squared error, Schlarmann et al. 2024) or TeCoA (cross entropy, Mao et al. 2023), with one step of 2ε the
method of Wong et al. 2020. With r > ε the steps are not projected onto the ball of radius ε, as in N-FGSM (de Jorge
et al. 2022), which prevents catastrophic overfitting to one-step attacks. Stored members were made against the
starting encoder; one or two steps adapt them to the current one.

Shapes: B images, C H W pixels, K outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
        noise: r, radius of the noise that is added first, likewise; above epsilon points are not projected.
    """

    steps: int
    step_size: float
    epsilon: float
    noise: float = 0.0

    @property
    def radius(self) -> float:
        """Largest distance of a refined point from the clean image; 1, the pixel range, without projection."""
        return self.epsilon if self.noise <= self.epsilon else 1.0


def refine(model: Model, points: Tensor, clean: Tensor, target: Tensor, loss: Loss, how: Refinement) -> Tensor:
    """Points after `how.steps` PGD steps, float32 [B, C, H, W], not rounded to 8 bits; parameters get no gradient.

    Dropout and stochastic depth are off during the steps, as in FARE's published loop. Cost: `how.steps` forward and
    input-only backward passes, 2/3 of a plain step each.

    Args:
        model: pixels → outputs.
        points: starting points, noise included, float32 [B, C, H, W]; they are projected first, since a mean plus a
            factor may lie outside the ball.
        clean: centres of the balls, float32 [B, C, H, W] in [0, 1].
        target: embeddings [B, K] or class indices int64 [B], whichever `loss` takes.
        loss: the loss to increase.
        how: settings of the steps.
    """

    def at(points: Tensor) -> tuple[Tensor, Tensor]:
        pixels = points.detach().requires_grad_()
        losses = loss.value(evaluate(model, pixels), target)
        (gradient,) = torch.autograd.grad(losses.sum(), pixels)
        return losses.detach(), gradient

    lower, upper = (clean - how.radius).clamp_(min=0), (clean + how.radius).clamp_(max=1)
    ball = Ball(lower, upper, clean, scale=1.0, grid=False)
    refined = torch.clamp(points, lower, upper)
    # A compiled backward pass would also compute the gradients of all parameters that require them.
    with attacked(model) if isinstance(model, nn.Module) else nullcontext():
        ascend(ball, at, refined, how.step_size, how.steps)
    return refined


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """Put a network into eval mode without parameter gradients, and restore it at the end of the block."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with frozen(model):
            yield
    finally:
        for module in training:
            module.training = True
