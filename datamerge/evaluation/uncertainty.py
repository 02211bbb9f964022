"""Standard errors and 95 % intervals of means over images.

Rates get Wilson's interval, which is right at 0 and 1 too; other means the percentile bootstrap over images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 2_000
BLOCK = 40  # resamples drawn at a time
BOOTSTRAP_SEED = 0
Z95 = 1.959963984540054


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error s/√n with s² = Σ(x − x̄)²/(n − 1); no error for one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)


def rate_and_error(hits: Sequence[bool]) -> tuple[float, float]:
    """Fraction p of hits and its binomial standard error √(p(1 − p)/n)."""
    rate = sum(hits) / len(hits)
    return rate, math.sqrt(rate * (1 - rate) / len(hits))


def wilson_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson 1927)."""
    rate, square = hits / count, Z95**2
    centre = (rate + square / (2 * count)) / (1 + square / count)
    half = Z95 / (1 + square / count) * math.sqrt(rate * (1 - rate) / count + square / (4 * count**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of the mean over images drawn again with replacement; the same every time."""
    array = np.asarray(values, dtype=np.float64)
    generator = np.random.default_rng(np.random.SeedSequence([BOOTSTRAP_SEED, len(array)]))
    chances = np.full(len(array), 1 / len(array))
    # In blocks, since the counts of all resamples of fifty thousand images take gigabytes.
    blocks = (generator.multinomial(len(array), chances, size=BLOCK) @ array for _ in range(RESAMPLES // BLOCK))
    low, high = np.quantile(np.concatenate(list(blocks)) / len(array), [0.025, 0.975])
    return float(low), float(high)
