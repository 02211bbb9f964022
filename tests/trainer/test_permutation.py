"""A permutation by index: a bijection for every size and key; all are equally frequent, and values are pinned."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.permutation import key_of, looks_uniform, sent
from trainer.data.permutation import IntArray, keys_of, permuted

WORDS = st.integers(0, 2**64 - 1)


def _whole(size: int, key: int) -> IntArray:
    return permuted(np.arange(size), np.full(size, size), np.full(size, key, np.uint64))


@given(st.one_of(st.sampled_from([1, 2, 3, 4, 5, 17, 255, 256, 257]), st.integers(1, 3000)), WORDS)
def test_every_index_occurs_once(size: int, key: int) -> None:
    assert sorted(_whole(size, key).tolist()) == list(range(size))


@given(st.lists(st.tuples(st.integers(1, 2**50), WORDS), min_size=1, max_size=20), st.integers(0, 2**50))
def test_elements_may_have_different_sizes_and_keys(pairs: list[tuple[int, int]], place: int) -> None:
    indices = [place % size for size, _ in pairs]
    sizes, keys = (
        np.array(column, kind) for column, kind in zip(zip(*pairs, strict=True), ("i8", "u8"), strict=True)
    )
    expected = [sent(index, size, key) for index, (size, key) in zip(indices, pairs, strict=True)]
    assert permuted(np.array(indices), sizes, keys).tolist() == expected


@given(WORDS, st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_keys_are_outputs_of_splitmix(base: int, numbers: list[int]) -> None:
    assert keys_of(base, np.array(numbers)).tolist() == [key_of(base, number) for number in numbers]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_permutations_are_equally_frequent(size: int) -> None:
    count = 60_000
    keys = keys_of(1, np.arange(count))
    found = np.stack([permuted(np.full(count, i), np.full(count, size), keys) for i in range(size)], axis=1)
    seen = np.unique(found @ size ** np.arange(size), return_counts=True)[1]
    expected = count / math.factorial(size)
    assert len(seen) == math.factorial(size)
    assert looks_uniform(seen, expected, len(seen) - 1)


@pytest.mark.parametrize("size", [9, 17, 100, 4096])
def test_half_of_the_permutations_are_odd(size: int) -> None:
    signs = [_sign(_whole(size, key)) for key in keys_of(2, np.arange(200)).tolist()]
    assert 60 < sum(sign > 0 for sign in signs) < 140  # 100 are expected, ± 7


def _sign(permutation: IntArray) -> int:
    seen, sign = np.zeros(len(permutation), bool), 1
    for start in range(len(permutation)):
        length, at = 0, start
        while not seen[at]:
            seen[at], at, length = True, int(permutation[at]), length + 1
        sign *= -1 if length and length % 2 == 0 else 1
    return sign


def test_neighbours_are_sent_to_independent_places() -> None:
    size = 2**16
    images = _whole(size, 3)
    distances = images - np.roll(images, 1)
    # Distances between images of neighbours are uniform: each of 64 ranges holds its share.
    found = np.bincount((distances % size) * 64 // size, minlength=64)
    assert looks_uniform(found, size / 64, 63)
    assert abs(np.corrcoef(images[1:], images[:-1])[0, 1]) < 0.02


def test_values_are_pinned() -> None:
    """The order of continued runs depends on these values."""
    assert _whole(7, 0).tolist() == [2, 6, 3, 4, 1, 0, 5]
    large = permuted(np.array([0, 1, 99_999_999]), np.full(3, 10**8), np.full(3, 12345, np.uint64))
    assert large.tolist() == [58975910, 18701776, 95488844]
    assert keys_of(5, np.arange(2)).tolist() == [7134611160154358618, 13877614986023876344]
