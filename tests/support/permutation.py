"""An independent implementation of the trainer's permutation in Python integers, and a test of uniformity."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

WORD = 2**64
STEP, STRIDE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


def mix(word: int) -> int:
    """SplitMix64's finaliser."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB % WORD
    return word ^ word >> 31


def key_of(base: int, number: int) -> int:
    """Output `number` of SplitMix64 in the state `base`."""
    return mix((base + (number + 1) * STEP) % WORD)


def sent(index: int, size: int, key: int) -> int:
    """Where the permutation of [0, size) sends an index."""
    rows = math.isqrt(size - 1) + 1
    columns = -(-size // rows)
    columns += columns % 2
    while True:
        x, y = divmod(index, rows)
        for number in range(1, 21):
            if number % 2:
                y = (y + mix((key + x * STRIDE + number * STEP) % WORD)) % rows
            else:
                x = (x + mix((key + y * STRIDE + number * STEP) % WORD)) % columns
        index = x * rows + y
        if index < size:
            return index


def looks_uniform(found: npt.ArrayLike, expected: npt.ArrayLike, freedom: int) -> bool:
    """Whether the chi-square statistic is within five standard deviations of its expectation (p of about 10⁻⁵)."""
    counts, expectation = np.asarray(found, float), np.asarray(expected, float)
    statistic = float(((counts - expectation) ** 2 / expectation).sum())
    return statistic < freedom + 5 * math.sqrt(2 * freedom)
