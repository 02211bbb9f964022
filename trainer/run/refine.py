"""Steps of PGD against the encoder as it is, from a stored image: a stored attack, or the clean image.

    x ← x_stored + r·U(−1, 1);   x ← Π[x + α·sign ∇_x L(f_θ(x), y)],   Π onto ‖x − x_clean‖∞ ≤ ε and [0, 1]

From the clean image with r = ε this is the attack of online adversarial training (Madry et al. 2018): with ten steps
and the squared error FARE (Schlarmann et al. 2024), with cross entropy TeCoA (Mao et al. 2023), with one step of
2ε that of Wong et al. 2020. With r > ε nothing is projected onto the ball of ε, as in N-FGSM (de Jorge et al. 2022),
which keeps one-step attacks from losing their meaning. Stored members were made for the encoder that training started
from; a step or two bring them up to date.

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
        noise: r, radius of the noise that is added first, likewise; above epsilon the ball no longer holds.
    """

    steps: int
    step_size: float
    epsilon: float
    noise: float = 0.0

    @property
    def radius(self) -> float:
        """How far a point may end from the clean image; 1, all of the pixel range, where nothing is projected."""
        return self.epsilon if self.noise <= self.epsilon else 1.0


def refine(model: Model, points: Tensor, clean: Tensor, target: Tensor, loss: Loss, how: Refinement) -> Tensor:
    """The points after `how.steps` steps of PGD, float32 [B, C, H, W]; parameters get no gradient.

    An attack from a given start, off the 8-bit grid, of which no final loss is taken. Dropout and stochastic depth
    rest meanwhile, as in FARE's own loop. Cost: `how.steps` forward and input-only backward passes, 2/3 of a plain
    step each.

    Args:
        model: pixels → outputs.
        points: where to start, noise included, float32 [B, C, H, W]; projected first, since a mean plus a factor may
            lie outside.
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

    lower, upper = (clean - how.radius).clamp_(min=0), (clean + how.radius).clamp_(max=1)
    ball = Ball(lower, upper, clean, scale=1.0, grid=False)
    refined = torch.clamp(points, lower, upper)
    # A compiled backward pass is one piece, and computes what is not asked for: gradients of all that could have one.
    with attacked(model) if isinstance(model, nn.Module) else nullcontext():
        ascend(ball, at, refined, how.step_size, how.steps)
    return refined


@contextmanager
def attacked(model: nn.Module) -> Iterator[None]:
    """A network in eval mode and without gradients of its parameters; it becomes what it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with frozen(model):
            yield
    finally:
        for module in training:
            module.training = True
