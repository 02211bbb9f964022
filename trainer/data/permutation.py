"""A random permutation of [0, n) as a function of the index: nothing is stored, whatever n is.

A Feistel network on a rectangle (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): write
i = a·x + y with 0 ≤ y < a ≈ √n and 0 ≤ x < b ≈ n/a; each round adds a random function of one coordinate to the
other, modulo its range, which can be undone and is therefore a permutation of the a·b points. What lands outside
[0, n), about 2 points in √n, is sent round again until it is inside (cycle walking), which leaves a permutation of
[0, n). The random function is SplitMix64 (Steele, Lea and Flood 2014) of key, round and coordinate.

It is computed with integers of 64 bits alone, so it is the same in every release of NumPy, whose generators'
streams may change.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

# Of both coordinates together. All permutations of 2 to 8 are equally frequent among 400,000 keys with 20 rounds,
# those of 5 and 6 are not with 12; larger sets need fewer.
ROUNDS = 20
_STEP, _STRIDE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUND_STEPS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * _STEP
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mixed(words: WordArray) -> WordArray:
    """SplitMix64's output for each state: a bijection of 64 bits, after which neighbours have nothing in common."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)


def keys_of(base: int, numbers: IntArray) -> WordArray:
    """A key for each number, all from one.

    Args:
        base: 64 random bits.
        numbers: what the keys are for.
    """
    return mixed(np.uint64(base) + (numbers.astype(np.uint64) + np.uint64(1)) * _STEP)


def permuted(indices: IntArray, sizes: IntArray, keys: WordArray) -> IntArray:
    """Where permutations send indices.

    Args:
        indices: [B], each in [0, size).
        sizes: [B], what is permuted for each; at most 2⁶².
        keys: [B]; equal size and key mean the same permutation.
    """
    found = np.array(indices, np.uint64)
    limits = np.asarray(sizes).astype(np.uint64)
    rows = np.ceil(np.sqrt(limits)).astype(np.uint64)
    columns = (limits + rows - np.uint64(1)) // rows
    # With two odd sides all rounds are even permutations, which half of all are not.
    columns += columns % np.uint64(2)
    found = _sent(found, rows, columns, keys)
    outside = np.flatnonzero(found >= limits)
    while len(outside):
        found[outside] = _sent(found[outside], rows[outside], columns[outside], keys[outside])
        outside = outside[found[outside] >= limits[outside]]
    return found.astype(np.int64)


def _sent(points: WordArray, rows: WordArray, columns: WordArray, keys: WordArray) -> WordArray:
    """The network on the whole rectangle."""
    x, y = np.divmod(points, rows)
    for first, second in zip(_ROUND_STEPS[::2], _ROUND_STEPS[1::2], strict=True):
        y = (y + mixed(keys + x * _STRIDE + first) % rows) % rows
        x = (x + mixed(keys + y * _STRIDE + second) % columns) % columns
    return x * rows + y
