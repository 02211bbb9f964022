"""The ℓ2 ball ‖δ‖₂ ≤ ε around each image, intersected with [0, 1]; the ℓ∞ ball is in `datamerge.attacks.ball`.

Shapes: B samples, C H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamerge.attacks.ball import Ball

Norm = Literal["linf", "l2"]
# Largest error of rounding a number in [0, 1] to float32.
HALF_ULP = 2.0**-25


@dataclass(frozen=True)
class EuclideanBall(Ball):
    """`Ball` with the Euclidean norm; `lower` and `upper` are the pixel range.

    Attributes:
        radius: ε.
    """

    radius: float = 0.0

    @classmethod
    def around(cls, clean: Tensor, epsilon: Fraction, grid: bool) -> EuclideanBall:
        """All points within `epsilon` of `clean`, [B, C, H, W] in [0, 1], and inside [0, 1]."""
        if grid:
            raise ValueError("grid: expected False in the ℓ2 ball, found True")
        return cls(torch.zeros_like(clean), torch.ones_like(clean), clean, 1.0, False, float(epsilon))

    @staticmethod
    def _one(shape: tuple[int, ...], levels: int | None, generator: np.random.Generator) -> npt.NDArray[np.float32]:
        return generator.standard_normal(shape, np.float32)

    def placed(self, draws: Tensor, radius: Fraction) -> Tensor:
        """Points at distance `radius` in random directions."""
        offsets = self.direction(draws.to(self.centre.device, non_blocking=True)) * float(radius)
        return self.clamp_(self.centre + offsets)

    def clamp_(self, points: Tensor) -> Tensor:
        """Project onto the ball, then onto [0, 1], which only shortens δ; in place."""
        offsets = points.double() - self.centre.double()
        # A margin for the rounding of all pixels, which could move points outside the ball.
        radius = max(self.radius - HALF_ULP * math.sqrt(offsets[0].numel()), 0.0)
        # A sample that has not moved stays where it is.
        factor = (radius / offsets.flatten(1).norm(dim=1).clamp_min(1e-300)).clamp_max(1)
        inside = self.centre.double() + offsets * factor.view(-1, 1, 1, 1)
        points.copy_(inside)
        return points.clamp_(0, 1)

    def direction(self, gradient: Tensor) -> Tensor:
        """∇/‖∇‖₂ of each sample; 0 where the gradient is 0."""
        length: Tensor = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)
        return gradient / length.view(-1, 1, 1, 1)
