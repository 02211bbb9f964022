"""First and second moments of a group, exact on the 8-bit grid.

A group x_1 … x_N is reduced to its mean 1/N Σ x_i and mean square 1/N Σ x_i∘x_i (PAPER §1, divisor N).
With ε = 2/255 the variance is about 1e-5 of the mean square, so `mean_square - mean**2` in low precision is noise.
Pixels are multiples of 1/255, hence their sums are exact integers. Stored are

    sum      Σx                    in units of 1/255
    scatter  N·Σx² − (Σx)²  ≥ 0    in units of 1/255²;   variance = scatter / (255·N)²

and nothing is rounded. `ExactMoments` are additive: two halves of a group combine without error.

Shapes: N members, pixels [C, H, W].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LEVELS = 255
# N²·255² must fit in int64 for the scatter to be exact.
MAX_COUNT = 11_900_000


@dataclass(frozen=True, slots=True)
class ExactMoments:
    """Count, Σx and Σx² of 8-bit samples, as integers.

    Attributes:
        count: number of samples N.
        sum: Σx, int64 [C, H, W].
        sum_of_squares: Σx², int64 [C, H, W].

    Examples:
        >>> pair = np.array([[[[100]]], [[[104]]]], np.uint8)  # N = 2 images of one pixel
        >>> moments = ExactMoments.of(pair)
        >>> moments.sum.item(), moments.scatter.item()  # the variance is 16 / (2·255)²
        (204, 16)
    """

    count: int
    sum: IntArray
    sum_of_squares: IntArray

    @classmethod
    def of(cls, samples: Iterable[npt.NDArray[np.uint8]]) -> ExactMoments:
        """Accumulate uint8 samples [C, H, W] one by one, in constant memory.

        Raises:
            ValueError: no sample, a dtype other than uint8, or samples of different shapes.
        """
        count, total, squares = 0, None, None
        for sample in samples:
            if sample.dtype != np.uint8:
                raise ValueError(f"expected uint8 samples, found {sample.dtype}")
            if total is None or squares is None:
                total = np.zeros(sample.shape, np.int64)
                squares = np.zeros(sample.shape, np.int64)
            elif sample.shape != total.shape:
                raise ValueError(f"expected samples of shape {total.shape}, found {sample.shape}")
            wide = sample.astype(np.int64)
            total += wide
            squares += wide * wide
            count += 1
        if total is None or squares is None:
            raise ValueError("expected at least one sample, found none")
        return cls(count, total, squares)

    def combine(self, other: ExactMoments) -> ExactMoments:
        """Moments of the union of two disjoint groups; exact, associative and commutative."""
        return ExactMoments(
            self.count + other.count, self.sum + other.sum, self.sum_of_squares + other.sum_of_squares
        )

    @property
    def scatter(self) -> IntArray:
        """N·Σx² − (Σx)², int64 [C, H, W], never negative (Cauchy-Schwarz, in integers).

        Raises:
            OverflowError: more than `MAX_COUNT` samples.
        """
        if self.count > MAX_COUNT:
            raise OverflowError(f"expected at most {MAX_COUNT} samples a group, found {self.count}")
        return self.count * self.sum_of_squares - self.sum * self.sum

    @property
    def mean(self) -> FloatArray:
        """Mean in [0, 1], float64 [C, H, W]."""
        return self.sum / (LEVELS * self.count)

    @property
    def mean_square(self) -> FloatArray:
        """Mean square in [0, 1], float64 [C, H, W]."""
        return self.sum_of_squares / (LEVELS**2 * self.count)


def two_pass_moments(members: npt.NDArray[np.floating]) -> tuple[FloatArray, FloatArray]:
    """Mean and mean square, float64 [C, H, W], of float members [N, C, H, W] that are off the 8-bit grid.

    The mean square is computed as variance + mean², with the variance from centred values, so that it is never below
    mean².
    """
    wide = np.asarray(members, np.float64)
    mean = wide.mean(axis=0)
    variance = np.square(wide - mean).mean(axis=0)
    return mean, variance + mean * mean


def sum_dtype(max_count: int) -> np.dtype[np.unsignedinteger]:
    """Smallest unsigned dtype that holds Σx of `max_count` 8-bit samples; OverflowError beyond 64 bits."""
    return _smallest_unsigned(max_count * LEVELS)


def scatter_dtype(max_count: int, pixel_range: int) -> np.dtype[np.unsignedinteger]:
    """Smallest unsigned dtype for the scatter of samples that differ by at most `pixel_range` grey levels.

    By Popoviciu's inequality the variance is at most range²/4, so the scatter is at most N²·range²/4.

    Raises:
        OverflowError: it needs more than 64 bits.
    """
    return _smallest_unsigned(max_count * max_count * pixel_range * pixel_range // 4)


def _smallest_unsigned(maximum: int) -> np.dtype[np.unsignedinteger]:
    for dtype in (np.uint16, np.uint32, np.uint64):
        if maximum <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise OverflowError(f"{maximum} does not fit in 64 bits")
