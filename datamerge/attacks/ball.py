"""The parts that all attacks share: the ℓ∞ ball, random starts, gradients with respect to pixels, and results.

On the 8-bit grid attacks run in units of 1/255: all bounds are small integers and hold exactly. Off the grid the
bounds are float32 numbers rounded towards x.

Shapes: B samples, C H W pixels, K embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from datamerge.attacks.arithmetic import arithmetic, in_fixed_order, quotient
from datamerge.attacks.objectives import Objective
from storage_schemas import LEVELS, ConfigError, DatamergeError, Radius
from storage_schemas.schema.seeds import group_seed

Precision = Literal["float32", "tf32", "bfloat16"]


class NonFiniteGradient(DatamergeError):
    """A loss or gradient of an attack is not finite. `indices` are the positions of its samples in the batch."""

    def __init__(self, indices: Sequence[int], names: Sequence[str], step: int) -> None:
        self.indices = list(indices)
        super().__init__(
            f"step {step} of the attack: the loss or its gradient is not finite for {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        )


@dataclass(frozen=True, slots=True)
class Attacked:
    """Result of an attack.

    Attributes:
        pixels: float32 [B, C, H, W] in [0, 1].
        start_loss: objective at the start, [B].
        loss: objective at `pixels`, [B], never below `start_loss`.
    """

    pixels: Tensor
    start_loss: Tensor
    loss: Tensor

    def __repr__(self) -> str:
        loss = f"{float(self.start_loss.mean()):.4g} → {float(self.loss.mean()):.4g}" if len(self.loss) else "none"
        return f"<Attacked {len(self.pixels)} images, {list(self.pixels.shape[1:])}: mean objective {loss}>"


@dataclass(frozen=True)
class Ball:
    """The search region of a batch, in units of 1/255 on the grid, else of the pixel range.

    Attributes:
        lower, upper, centre: bounds and clean images, [B, C, H, W].
        scale: number of units in the pixel range.
        grid: whether results are multiples of 1/255.
    """

    lower: Tensor
    upper: Tensor
    centre: Tensor
    scale: float
    grid: bool

    @classmethod
    def around(cls, clean: Tensor, epsilon: Fraction, grid: bool) -> Ball:
        """All points within `epsilon` of `clean`, [B, C, H, W] in [0, 1], and inside [0, 1]."""
        if grid:
            centre = (clean * LEVELS).round_()
            radius = math.floor(epsilon * LEVELS)
            lower, upper = (centre - radius).clamp_min_(0), (centre + radius).clamp_max_(LEVELS)
            return cls(lower, upper, centre, float(LEVELS), True)
        wide, radius64 = clean.double(), float(epsilon)
        lower, upper = (wide - radius64).float(), (wide + radius64).float()
        # Conversion to float32 may round outwards; step back to the last number inside.
        lower = torch.where(wide - lower.double() > radius64, torch.nextafter(lower, clean), lower)
        upper = torch.where(upper.double() - wide > radius64, torch.nextafter(upper, clean), upper)
        return cls(lower.clamp_min(0), upper.clamp_max(1), clean, 1.0, False)

    @classmethod
    def draw(
        cls,
        shape: tuple[int, ...],
        radius: Fraction,
        grid: bool,
        generators: Sequence[np.random.Generator],
        pinned: bool = False,
    ) -> Tensor:
        """Random numbers for starts, [B, C, H, W]; drawn on the CPU, so that every device gets the same.

        Args:
            shape: C, H, W.
            radius: radius of the starts.
            grid: see the class.
            generators: one random generator per sample.
            pinned: whether to use pinned memory, from which a GPU copies asynchronously.
        """
        levels = math.floor(radius * LEVELS)
        drawn = torch.empty(
            (len(generators), *shape), dtype=torch.int16 if grid else torch.float32, pin_memory=pinned
        )
        for row, generator in zip(drawn.numpy(), generators, strict=True):
            row[:] = cls._one(shape, levels if grid else None, generator)
        return drawn

    @staticmethod
    def _one(
        shape: tuple[int, ...], levels: int | None, generator: np.random.Generator
    ) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
        """The random numbers of one sample: integers in [−levels, levels] on the grid, else in [0, 1)."""
        if levels is None:
            return generator.random(shape, np.float32)
        return generator.integers(-levels, levels, shape, np.int16, endpoint=True)

    def start(
        self,
        random: bool,
        radius: Fraction,
        generators: Sequence[np.random.Generator],
        draws: Tensor | None = None,
    ) -> Tensor:
        """The centre, or random points around it, from the given `draws` or new ones."""
        if not random:
            return self.centre
        if draws is None:
            draws = self.draw(self.centre.shape[1:], radius, self.grid, generators)
        return self.placed(draws, radius)

    def placed(self, draws: Tensor, radius: Fraction) -> Tensor:
        """Points of the ball from draws."""
        # Convert after the copy: int16 is half the bytes, and a copy from pinned memory is asynchronous.
        there = draws.to(self.centre.device, non_blocking=True)
        offsets = there.float() if self.grid else (there * 2 - 1) * float(radius)
        return self.clamp_(offsets.add_(self.centre))

    def clamp_(self, points: Tensor) -> Tensor:
        """Project onto the ball, in place."""
        return torch.clamp(points, self.lower, self.upper, out=points)

    def direction(self, gradient: Tensor) -> Tensor:
        """The steepest ascent direction of length 1 in the ball's norm."""
        return gradient.sign()

    def choose(self, start: Tensor, start_loss: Tensor, points: Tensor, loss: Tensor) -> Attacked:
        """`points`, or the start for samples whose loss is higher there, so that no attack lowers the loss."""
        worse = loss < start_loss
        chosen = torch.where(worse.view(-1, 1, 1, 1), start, points)
        return Attacked(quotient(chosen, self.scale), start_loss, torch.maximum(loss, start_loss))


def parse_lengths(settings: Any, *names: str) -> None:
    """Convert lengths of a frozen dataclass, text such as `2/255` or floats, to exact `Radius`es.

    Raises:
        ConfigError: a value is not a length.
    """
    for name in names:
        value = getattr(settings, name)
        if value is None or isinstance(value, Fraction):
            continue
        try:
            object.__setattr__(settings, name, Radius(value))
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None


def radius_of_starts(settings: Any) -> Fraction:
    """Radius of an attack's random starts: `start_radius` if set, else epsilon."""
    radius: Fraction = settings.epsilon if settings.start_radius is None else settings.start_radius
    return radius


def check_ball(epsilon: Fraction, grid: bool, start_radius: Fraction | None) -> None:
    """Raise ConfigError if the ball has no grid point but its centre, or if starts may be outside the ball."""
    for name, length in (("epsilon", epsilon), ("start_radius", start_radius)):
        if grid and length is not None and 0 < length < Fraction(1, LEVELS):
            raise ConfigError(
                f"{name}: expected at least 1/255, since a smaller ball holds no other 8-bit image, found {length}; "
                f'use `{name}="1/255"` or more, or leave the grid with `grid=False`'
            )
    if start_radius is not None and start_radius > epsilon:
        raise ConfigError(
            f"start_radius: expected at most epsilon, {epsilon}, found {start_radius}; lower `start_radius`"
        )


class Gradients:
    """Gradients of an objective with respect to pixels; keeps track of samples whose values are not finite.

    Finiteness is recorded on the device at every step and read once, at the end, because reading it at every step
    would make the CPU wait for the GPU.

    On a GPU gradients come from deterministic kernels, if the model's operations have them.
    """

    def __init__(
        self, model: nn.Module, target: Tensor, objective: Objective, scale: float, precision: Precision
    ) -> None:
        self._model, self._target, self._objective = model, target, objective
        self._scale, self._precision = scale, precision
        # Losses only rank points and are stored for information, so TF32 is precise enough; in float32 they took
        # longer on a GPU than the steps in bfloat16.
        exact = precision == "float32" or target.device.type != "cuda"
        self._loss_precision: Precision = "float32" if exact else "tf32"
        self._first_bad: Tensor | None = None
        self._step = 0

    def at(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [B] and gradient [B, C, H, W] at points in the ball's units."""
        pixels = quotient(points, self._scale).requires_grad_()

        def passes() -> tuple[Tensor, Tensor]:
            with arithmetic(pixels.device, tf32=self._precision == "tf32"):
                loss = self._objective(forward(self._model, pixels, self._precision), self._target)
                (gradient,) = torch.autograd.grad(loss.sum(), pixels)
            return loss.detach(), gradient

        loss, gradient = in_fixed_order(self._model, pixels.device, passes)
        self._note(torch.isfinite(loss) & torch.isfinite(gradient.sum(dim=(1, 2, 3))))
        return loss, gradient

    def loss_at(self, points: Tensor) -> Tensor:
        """Loss [B] for the record: in float32, or in TF32 on a GPU if gradients have a lower precision."""
        with torch.no_grad():
            pixels = quotient(points, self._scale)
            loss = self._objective(forward(self._model, pixels, self._loss_precision), self._target)
        self._note(torch.isfinite(loss))
        return loss

    def start_loss(self, start: Tensor, loss: Tensor) -> Tensor:
        """`loss_at` of the start, reusing the loss from its gradient if it has the same precision."""
        return loss if self._precision == self._loss_precision else self.loss_at(start)

    def check(self, names: Sequence[str]) -> None:
        """Raise NonFiniteGradient if any loss or gradient so far was not finite."""
        if self._first_bad is None:
            return
        first_bad = self._first_bad.tolist()
        indices = [index for index, step in enumerate(first_bad) if step >= 0]
        if indices:
            step = min(first_bad[index] for index in indices)
            raise NonFiniteGradient(indices, [names[i] if i < len(names) else f"sample {i}" for i in indices], step)

    def _note(self, finite: Tensor) -> None:
        if self._first_bad is None:
            self._first_bad = torch.full(finite.shape, -1, device=finite.device)
        self._first_bad = torch.where(~finite & (self._first_bad < 0), self._step, self._first_bad)
        self._step += 1


def forward(model: nn.Module, pixels: Tensor, precision: Precision) -> Tensor:
    """Outputs of a network on float32 pixels, computed in `precision` and returned as float32 or wider."""
    with (
        arithmetic(pixels.device, tf32=precision == "tf32"),
        torch.autocast(pixels.device.type, torch.bfloat16, enabled=precision == "bfloat16"),
    ):
        outputs = cast(Tensor, model(pixels))
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires gradients; the flags are restored afterwards."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def sample_generators(seed: int, key: str, count: int) -> list[np.random.Generator]:
    """Independent random generators for `count` members of group `key`; they depend on the seed and key alone."""
    return [np.random.default_rng(child) for child in group_seed(seed, key).spawn(count)]
