"""Encodings of exact moments: uint8_moments keeps them exactly, float32 rounds them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from storage_schemas import ArraySpec, ExactMoments, Layout, Record
from storage_schemas.schema.moments import LEVELS, scatter_dtype, sum_dtype
from storage_schemas.schema.record import checksum, encode_exact

EPS32 = float(np.finfo(np.float32).eps)
MEMBERS = arrays(np.uint8, st.tuples(st.integers(1, 12), st.just(1), st.integers(1, 3), st.integers(1, 3)))


def _layout(encoding: str, shape: tuple[int, ...], count: int, spread: int = 255) -> Layout:
    dtypes = (
        {"mean": np.dtype("f4"), "mean_square": np.dtype("f4")}
        if encoding == "float32"
        else {"sum": sum_dtype(count), "scatter": scatter_dtype(count, spread)}
    )
    specs = tuple(ArraySpec.of(name, dtype, shape) for name, dtype in dtypes.items())
    return Layout.model_validate(
        {"format": "zarr", "encoding": encoding, "arrays": specs, "groups": 1, "groups_per_shard": 1}
    )


def _record(encoding: str, members: npt.NDArray[np.uint8]) -> Record:
    layout = _layout(encoding, members.shape[1:], len(members))
    return Record("k", len(members), layout.encoding, encode_exact(ExactMoments.of(members), layout))


@settings(deadline=None, max_examples=80)
@given(MEMBERS)
def test_uint8_moments_are_correctly_rounded(members: npt.NDArray[np.uint8]) -> None:
    record = _record("uint8_moments", members)
    scaled = members.astype(np.float64) / LEVELS
    variance = np.square(scaled - scaled.mean(axis=0)).mean(axis=0)
    assert record.mean.dtype == record.mean_square.dtype == record.variance.dtype == np.float32
    np.testing.assert_allclose(record.mean, scaled.mean(axis=0), rtol=EPS32)
    np.testing.assert_allclose(record.mean_square, (scaled**2).mean(axis=0), rtol=EPS32)
    np.testing.assert_allclose(record.variance, variance, rtol=EPS32, atol=1e-15)
    assert record.clipped_variances() == 0


@settings(deadline=None, max_examples=80)
@given(MEMBERS)
def test_float32_is_within_rounding_and_never_negative(members: npt.NDArray[np.uint8]) -> None:
    record = _record("float32", members)
    exact = ExactMoments.of(members)
    np.testing.assert_allclose(record.mean, exact.mean, rtol=EPS32 / 2)
    np.testing.assert_allclose(record.mean_square, exact.mean_square, rtol=EPS32 / 2)
    assert (record.variance >= 0).all()
    # Half a unit in the last place of the mean square, and twice that of the mean.
    allowed = 1.5 * EPS32 * exact.mean_square + 1e-12
    true = exact.scatter / (LEVELS * exact.count) ** 2
    assert (np.abs(record.variance - true) <= allowed).all()


def test_clipped_variances_are_counted() -> None:
    """Constant groups have variance 0; rounding leaves many of the mean squares too small."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    record = _record("float32", np.repeat(levels, 3, axis=0))
    mean = (levels[0] / 255.0).astype(np.float32).astype(np.float64)
    mean_square = ((levels[0] / 255.0) ** 2).astype(np.float32).astype(np.float64)
    expected = int(np.count_nonzero(mean_square < mean * mean))
    assert 0 < expected < 256
    assert record.clipped_variances() == expected
    assert record.variance.min() == 0
    assert _record("uint8_moments", np.repeat(levels, 3, axis=0)).variance.max() == 0


@pytest.mark.parametrize("name", ["sum", "scatter"])
def test_a_group_larger_than_planned_is_refused(name: str) -> None:
    """More members than planned overflow the sum, a wider spread than planned the scatter."""
    members = np.full((300 if name == "sum" else 4, 1, 1, 1), 255, np.uint8)
    members[0] = 0
    layout = _layout("uint8_moments", (1, 1, 1), 4, spread=2)
    with pytest.raises(OverflowError, match=name):
        encode_exact(ExactMoments.of(members), layout)


def test_padding_is_no_member(make_layout: Callable[..., Layout]) -> None:
    layout = make_layout()
    members = np.arange(240, dtype=np.uint8).reshape(4, 3, 4, 5)
    record = Record("k", 2, layout.encoding, {"members": members})
    assert record.members is not None
    np.testing.assert_array_equal(record.members, members[:2])
    assert record.target is None
    assert record.clean is None


def test_checksum_covers_every_bit_and_ignores_byte_order_and_memory_order(
    make_layout: Callable[..., Layout], make_record: Callable[..., Record]
) -> None:
    layout = make_layout()
    for name, array in make_record(0, layout).arrays.items():
        spec = layout.array(name)
        assert spec is not None
        expected = checksum(array, spec)
        assert checksum(np.asfortranarray(array.astype(array.dtype.newbyteorder(">"))), spec) == expected
        for position in {0, array.nbytes // 2, array.nbytes - 1}:
            flipped = bytearray(array.tobytes())
            flipped[position] ^= 1
            changed = np.frombuffer(bytes(flipped), array.dtype).reshape(array.shape)
            assert checksum(changed, spec) != expected


def test_checksum_is_plain_crc32c_of_the_bytes(
    make_layout: Callable[..., Layout], make_record: Callable[..., Record]
) -> None:
    """CRC-32C (Castagnoli), bit by bit from its polynomial, so that other languages can check records."""
    layout = make_layout(extras=())
    arrays_ = make_record(1, layout).arrays
    for spec in layout.arrays:
        crc = 0xFFFFFFFF
        for byte in arrays_[spec.name].astype(f"<{arrays_[spec.name].dtype.str[1:]}").tobytes():
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        assert checksum(arrays_[spec.name], spec) == f"{crc ^ 0xFFFFFFFF:08x}"
