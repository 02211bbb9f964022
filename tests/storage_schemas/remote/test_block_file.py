"""Writing a server's answer to a cached copy: pieces of any size, and blocks are marked only once they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage_schemas.access.block_file import BLOCK, UNIT, BlockFile
from storage_schemas.access.folder import Folder

SIZE = 2 * UNIT + 3 * BLOCK + 5
DATA = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()


def _pieces(start: int, largest: int, lost_at: int = SIZE + 1) -> Iterator[bytes]:
    """The bytes from `start` on in pieces of random sizes; the connection is lost after the byte `lost_at`."""
    rng, at = np.random.default_rng(largest), start
    while at < SIZE:
        end = min(SIZE, at + int(rng.integers(0, largest + 1)))
        yield DATA[at:end]
        at = end
        if at >= lost_at:
            raise ConnectionError


def _copy(tmp_path: Path) -> BlockFile:
    return Folder(tmp_path, 10 * SIZE).open("a", SIZE)


@pytest.mark.parametrize("largest", [7000, UNIT, 2 * UNIT + 1, SIZE])
@pytest.mark.parametrize("first", [0, 3, UNIT // BLOCK])
def test_pieces_of_any_size_give_the_same_bytes(tmp_path: Path, largest: int, first: int) -> None:
    file = _copy(tmp_path)
    file.write(first, _pieces(first * BLOCK, largest))
    assert file.view[first * BLOCK :].tobytes() == DATA[first * BLOCK :]
    assert file.here.tolist() == [False] * first + [True] * (len(file.here) - first)
    again = _copy(tmp_path)  # as another process sees it
    assert (again.here == file.here).all()


@pytest.mark.parametrize("largest", [7000, UNIT])
def test_after_a_lost_connection_only_whole_blocks_are_marked(tmp_path: Path, largest: int) -> None:
    file = _copy(tmp_path)
    with pytest.raises(ConnectionError):
        file.write(0, _pieces(0, largest, UNIT + UNIT // 2))
    there = int(file.here.sum())
    assert there >= UNIT // BLOCK
    assert file.here[:there].all()
    assert file.view[: there * BLOCK].tobytes() == DATA[: there * BLOCK]
