"""A random permutation of [0, n) as a function of the index, in constant memory.

A Feistel network on a rectangle (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): write
i = a·x + y with 0 ≤ y < a ≈ √n and 0 ≤ x < b ≈ n/a; each round adds a random function of one coordinate to the
other, modulo its range, which is invertible and so a permutation of the a·b points. A point that lands outside
[0, n), about a fraction 2/√n of them, goes through the network again until it is inside (cycle walking), which gives
a permutation of [0, n). The random function is SplitMix64 (Steele, Lea and Flood 2014) of key, round and coordinate.

It uses only 64-bit integer arithmetic and so does not change with NumPy's random generators.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
WordArray = npt.NDArray[np.uint64]

# Rounds of both coordinates together. Over 400,000 keys all permutations of 2 to 8 elements are equally frequent with
# 20 rounds; with 12 those of 5 and 6 elements are not. Larger sets need fewer.
ROUNDS = 20
_STEP, _STRIDE = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD1342543DE82EF95)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUND_STEPS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * _STEP
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)


def mixed(words: WordArray) -> WordArray:
    """SplitMix64's output for each state: a bijection of 64-bit words that decorrelates neighbours."""
    words = (words ^ (words >> _30)) * _FIRST
    words = (words ^ (words >> _27)) * _SECOND
    return words ^ (words >> _31)


def keys_of(base: int, numbers: IntArray) -> WordArray:
    """Derive a key for each number from 64 random bits.

    Args:
        base: 64 random bits.
        numbers: integers ≥ 0, any shape.
    """
    return mixed(np.uint64(base) + (numbers.astype(np.uint64) + np.uint64(1)) * _STEP)


def permuted(indices: IntArray, sizes: IntArray, keys: WordArray) -> IntArray:
    """Images of indices under the permutations given by sizes and keys, [B].

    Args:
        indices: [B], each in [0, size).
        sizes: [B], number of elements of each permutation; at most 2⁶².
        keys: [B]; equal size and key give the same permutation.

    Examples:
        >>> key = keys_of(1, np.zeros(5, np.int64))
        >>> sorted(permuted(np.arange(5), np.full(5, 5), key).tolist())
        [0, 1, 2, 3, 4]
    """
    found = np.array(indices, np.uint64)
    limits = np.asarray(sizes).astype(np.uint64)
    rows = np.ceil(np.sqrt(limits)).astype(np.uint64)
    columns = (limits + rows - np.uint64(1)) // rows
    # With two odd sides every round is an even permutation, so odd ones would never occur.
    columns += columns % np.uint64(2)
    found = _sent(found, rows, columns, keys)
    outside = np.flatnonzero(found >= limits)
    while len(outside):
        found[outside] = _sent(found[outside], rows[outside], columns[outside], keys[outside])
        outside = outside[found[outside] >= limits[outside]]
    return found.astype(np.int64)


def _sent(points: WordArray, rows: WordArray, columns: WordArray, keys: WordArray) -> WordArray:
    """Apply the Feistel network to points of the rectangle."""
    x, y = np.divmod(points, rows)
    for first, second in zip(_ROUND_STEPS[::2], _ROUND_STEPS[1::2], strict=True):
        y = (y + mixed(keys + x * _STRIDE + first) % rows) % rows
        x = (x + mixed(keys + y * _STRIDE + second) % columns) % columns
    return x * rows + y
