"""Decoding a part of a Blosc chunk gives the same bytes as decoding all of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Blosc

from storage_schemas.stores.blosc_blocks import decoded_part


@given(
    size=st.integers(1, 5000),
    block=st.sampled_from([0, 128, 256, 1000, 4096]),
    typesize=st.sampled_from([1, 2, 4]),
    cname=st.sampled_from(["zstd", "lz4", "blosclz", "zlib"]),
    noise=st.integers(1, 256),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_a_decoded_part_equals_that_of_the_whole(
    size: int, block: int, typesize: int, cname: str, noise: int, seed: int, data: st.DataObject
) -> None:
    values = np.random.default_rng(seed).integers(0, noise, size, np.uint8)
    values = values[: max(typesize, size - size % typesize)]
    coder = Blosc(cname, 5, Blosc.SHUFFLE, block, typesize)
    buffer = np.frombuffer(coder.encode(values), np.uint8)
    start = data.draw(st.integers(0, len(values) - 1))
    stop = data.draw(st.integers(start + 1, len(values)))
    assert np.array_equal(decoded_part(buffer, start, stop), values[start:stop])


@pytest.mark.parametrize("at", [16, 20])
def test_blocks_outside_the_buffer_are_refused(at: int) -> None:
    values = np.random.default_rng(0).integers(0, 4, 4000, np.uint8)
    buffer = np.frombuffer(Blosc("zstd", 5, Blosc.SHUFFLE, 1024, 1).encode(values), np.uint8).copy()
    buffer[at : at + 4] = 255
    with pytest.raises(ValueError, match="expected bytes"):
        decoded_part(buffer, 0, 2000)
