"""Moments against references: integers against Python's big ints, fractions against float64 in two passes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from storage_schemas import ExactMoments, two_pass_moments
from storage_schemas.schema.moments import LEVELS, MAX_COUNT, scatter_dtype, sum_dtype

Pixels = npt.NDArray[np.uint8]

GROUPS = arrays(np.uint8, array_shapes(min_dims=2, max_dims=4, max_side=5))


def _equal(one: ExactMoments, other: ExactMoments) -> bool:
    return (
        one.count == other.count
        and np.array_equal(one.sum, other.sum)
        and np.array_equal(one.sum_of_squares, other.sum_of_squares)
    )


def _big_ints(members: Pixels) -> tuple[list[int], list[int], list[int]]:
    """Σx, Σx² and N·Σx² − (Σx)² of every pixel in unbounded integers."""
    columns = members.reshape(len(members), -1).T.tolist()
    totals = [sum(column) for column in columns]
    squares = [sum(value * value for value in column) for column in columns]
    scatters = [len(members) * q - s * s for s, q in zip(totals, squares, strict=True)]
    return totals, squares, scatters


@settings(deadline=None, max_examples=60)
@given(GROUPS)
def test_integers_are_exact(members: Pixels) -> None:
    moments = ExactMoments.of(members)
    totals, squares, scatters = _big_ints(members)
    assert moments.count == len(members)
    assert moments.sum.ravel().tolist() == totals
    assert moments.sum_of_squares.ravel().tolist() == squares
    assert moments.scatter.ravel().tolist() == scatters
    assert moments.scatter.min() >= 0


@pytest.mark.parametrize("count", [1, 2, 10, 257, 6_000])
@pytest.mark.parametrize("kind", ["random", "extremes", "nearly_constant"])
def test_agrees_with_two_passes_in_float64(count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    shape = (count, 1, 3, 4)
    if kind == "random":
        members = rng.integers(0, 256, shape).astype(np.uint8)
    elif kind == "extremes":
        members = (255 * rng.integers(0, 2, shape)).astype(np.uint8)
    else:  # the case of the paper: two grey levels of perturbation on a bright image
        members = (250 + rng.integers(-2, 3, shape)).astype(np.uint8)
    moments = ExactMoments.of(members)
    scaled = members.astype(np.float64) / LEVELS
    mean = np.mean(scaled, axis=0)
    variance = np.mean((scaled - mean) ** 2, axis=0)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(moments.mean_square, np.mean(scaled**2, axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.scatter / (LEVELS * count) ** 2, variance, rtol=1e-10, atol=1e-18)
    totals, squares, scatters = _big_ints(members)
    assert moments.sum.ravel().tolist() == totals
    assert moments.sum_of_squares.ravel().tolist() == squares
    assert moments.scatter.ravel().tolist() == scatters


@settings(deadline=None, max_examples=60)
@given(GROUPS, st.randoms(use_true_random=False))
def test_order_of_members_does_not_matter(members: Pixels, random: object) -> None:
    order = list(range(len(members)))
    random.shuffle(order)  # type: ignore[attr-defined]
    assert _equal(ExactMoments.of(members[order]), ExactMoments.of(members))


@settings(deadline=None, max_examples=60)
@given(arrays(np.uint8, st.tuples(st.integers(3, 9), st.just(2), st.just(3))), st.data())
def test_parts_combine_to_the_whole(members: Pixels, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, len(members) - 2))
    second = data.draw(st.integers(first + 1, len(members) - 1))
    parts = [ExactMoments.of(part) for part in (members[:first], members[first:second], members[second:])]
    whole = ExactMoments.of(members)
    assert _equal(parts[0].combine(parts[1]).combine(parts[2]), whole)
    assert _equal(parts[0].combine(parts[1].combine(parts[2])), whole)
    assert _equal(parts[2].combine(parts[0]).combine(parts[1]), whole)


def test_members_may_be_a_stream() -> None:
    members = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
    assert _equal(ExactMoments.of(iter(members)), ExactMoments.of(members))


@pytest.mark.parametrize(
    ("samples", "fact"),
    [
        ([], "none"),
        ([np.zeros((2, 2), np.float32)], "float32"),
        ([np.zeros((2, 2), np.int64)], "int64"),
        ([np.zeros((2, 2), np.uint8), np.zeros((1, 2), np.uint8)], r"\(2, 2\).*\(1, 2\)"),
    ],
)
def test_refuses_what_it_cannot_sum_exactly(samples: list[Pixels], fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        ExactMoments.of(samples)


def test_scatter_is_exact_up_to_the_documented_count_and_refused_beyond() -> None:
    """Half of the largest group is black, half white: the largest scatter there is."""
    half = MAX_COUNT // 2
    total = np.array([half * LEVELS])
    moments = ExactMoments(2 * half, total, total * LEVELS)
    assert int(moments.scatter[0]) == 2 * half * half * LEVELS**2 - (half * LEVELS) ** 2
    beyond = ExactMoments(MAX_COUNT + 1, total, total)
    with pytest.raises(OverflowError, match=str(MAX_COUNT)):
        _ = beyond.scatter


@given(st.integers(1, MAX_COUNT), st.integers(0, 255), st.integers(0, 255))
def test_planned_dtypes_hold_the_worst_group(count: int, pixel_range: int, low: int) -> None:
    """The worst sum is all white; the worst scatter splits a group evenly between two levels."""
    assert count * 255 <= np.iinfo(sum_dtype(count)).max
    low = min(low, 255 - pixel_range)
    high_members = count // 2
    total = count * low + high_members * pixel_range
    squares = (count - high_members) * low**2 + high_members * (low + pixel_range) ** 2
    assert count * squares - total * total <= np.iinfo(scatter_dtype(count, pixel_range)).max


@settings(deadline=None, max_examples=60)
@given(arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 4))))
def test_planned_dtypes_hold_any_group(members: Pixels) -> None:
    spread = int((members.max(axis=0).astype(int) - members.min(axis=0)).max())
    moments = ExactMoments.of(members)
    assert int(moments.sum.max()) <= np.iinfo(sum_dtype(len(members))).max
    assert int(moments.scatter.max()) <= np.iinfo(scatter_dtype(len(members), spread)).max


def test_the_papers_groups_take_two_bytes_a_value() -> None:
    assert sum_dtype(10) == np.uint16
    assert scatter_dtype(10, 4) == np.uint16
    assert sum_dtype(6_000) == np.uint32


@pytest.mark.parametrize("centre", [0.0, 0.5, 0.999, 1.0])
def test_two_passes_never_put_the_mean_square_below_the_squared_mean(centre: float) -> None:
    rng = np.random.default_rng(0)
    members = (centre + 1e-4 * rng.normal(size=(10, 3, 4, 5))).astype(np.float32)
    mean, mean_square = two_pass_moments(members)
    wide = members.astype(np.float64)
    assert (mean_square >= mean * mean).all()
    np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(mean_square - mean * mean, wide.var(axis=0), rtol=1e-6)
    constant = np.full((7, 1, 2, 2), np.float32(centre))
    np.testing.assert_array_equal(two_pass_moments(constant)[1], np.float64(np.float32(centre)) ** 2)
