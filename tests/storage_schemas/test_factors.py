"""Factors against the dense covariance of the members, in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from storage_schemas.schema.factors import FactorKind, decode_factors, factor_dtype, factors

SHAPE = (3, 2, 2)


def _members(count: int, seed: int = 0, spread: int = 120) -> npt.NDArray[np.uint8]:
    generator = np.random.default_rng(seed)
    base = generator.integers(0, 255 - spread, SHAPE)
    return (base + generator.integers(0, spread + 1, (count, *SHAPE))).astype(np.uint8)


def _covariance(members: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Divisor N, [0, 1] pixel units."""
    flat = members.reshape(len(members), -1) / 255.0
    return np.cov(flat.T, bias=True)


def _outer(stored: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    flat = stored.reshape(len(stored), -1) / (255.0 * math.sqrt(len(stored)))
    return flat.T @ flat


@pytest.mark.parametrize("count", [1, 3])
def test_sketches_have_the_covariance_as_their_expectation(count: int) -> None:
    members = _members(6)
    errors = []
    for draws in (40, 4000):
        generator = np.random.default_rng(1)
        mean = np.mean([_outer(factors(members, count, "sketch", generator)) for _ in range(draws)], axis=0)
        errors.append(np.linalg.norm(mean - _covariance(members)) / np.linalg.norm(_covariance(members)))
    assert errors[1] < 0.05
    assert errors[1] < errors[0] / 4  # 1/√100 is 0.1


def test_all_principal_directions_give_the_covariance() -> None:
    members = _members(5)
    found, expected = _outer(factors(members, 4, "principal", np.random.default_rng(0))), _covariance(members)
    # Rounding moves an entry of 255·√k·F by at most 1/2.
    assert np.abs(found - expected).max() < 4 * 120 / 255 * (0.5 / 255) / math.sqrt(4)


@pytest.mark.parametrize(("number", "count"), [(2, 1), (3, 2), (3, 4)])
def test_sketches_of_as_many_factors_as_there_are_directions_are_exact(number: int, count: int) -> None:
    members = _members(number)
    found, expected = _outer(factors(members, count, "sketch", np.random.default_rng(0))), _covariance(members)
    assert np.abs(found - expected).max() < count * 120 / 255 * (0.5 / 255) / math.sqrt(count)


def test_a_pair_is_its_mean_plus_and_minus_one_factor() -> None:
    members = _members(2)
    mean, deviation = members.mean(axis=0), factors(members, 1, "sketch", np.random.default_rng(0))[0]
    first = min((mean + deviation, mean - deviation), key=lambda image: float(np.abs(image - members[0]).max()))
    assert np.abs(first - members[0]).max() <= 0.5


def test_one_principal_direction_is_the_largest_eigenpair() -> None:
    members = _members(8)
    values, vectors = np.linalg.eigh(_covariance(members))
    expected = math.sqrt(values[-1]) * vectors[:, -1] * 255
    found = factors(members, 1, "principal", np.random.default_rng(0)).ravel()
    assert min(np.abs(found - expected).max(), np.abs(found + expected).max()) <= 0.5 + 1e-9


def test_equal_members_have_no_directions() -> None:
    members = np.repeat(_members(1), 4, axis=0)
    for kind in ("sketch", "principal"):
        assert not factors(members, 2, kind, np.random.default_rng(0)).any()


@settings(max_examples=60, deadline=None)
@given(
    members=arrays.arrays(np.uint8, st.tuples(st.integers(2, 9), *(st.just(size) for size in SHAPE))),
    kind=st.sampled_from(["sketch", "principal"]),
    seed=st.integers(0, 9),
)
def test_stored_values_fit_their_dtype(members: npt.NDArray[np.uint8], kind: FactorKind, seed: int) -> None:
    count = min(3, len(members) - 1)
    stored = factors(members, count, kind, np.random.default_rng(seed))
    spread = int(members.astype(int).max() - members.min())
    assert np.abs(stored).max() <= math.ceil(math.sqrt(len(members)) * spread / 2)
    narrow = stored.astype(factor_dtype(len(members), spread))
    np.testing.assert_array_equal(narrow, stored)
    np.testing.assert_allclose(decode_factors(narrow), stored / 255 / math.sqrt(count), rtol=1e-6)


def test_dtypes_grow_with_the_spread() -> None:
    assert factor_dtype(10, 4) == np.int8
    assert factor_dtype(5, 104) == np.int8
    assert factor_dtype(10, 104) == np.int16
    with pytest.raises(OverflowError, match="32 bits"):
        factor_dtype(10**18, 255)
