"""Partial decompression of a Blosc buffer.

Blosc (version 1) compresses each block independently
(https://github.com/Blosc/c-blosc/blob/main/README_CHUNK_FORMAT.rst):

    bytes     0 .. 16    versions, flags, type size; then as uint32: bytes, bytes of a block, bytes of this buffer
    int32     [blocks]   position of each block
    blocks               compressed, not necessarily in this order; the last may be shorter than the others

Consecutive blocks behind a new header form a valid buffer, which any decoder accepts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numcodecs import Blosc

from storage_schemas.access.block_file import Bytes

HEADER = 16
TYPE_SIZE, FLAGS = 3, 2  # positions of bytes
SIZES = slice(4, HEADER)
STORED = 0x2  # flag: not compressed at all
_BLOSC = Blosc()


def decoded_part(buffer: Bytes, start: int, stop: int) -> Bytes:
    """Bytes [start, stop) of the decompressed contents of a buffer.

    Args:
        buffer: the caller has checked that its header states its length.
        start, stop: range in the decompressed contents.

    Raises:
        ValueError, RuntimeError: the buffer is malformed.
    """
    total, size, _ = (int(value) for value in _words(buffer[SIZES]))
    if buffer[FLAGS] & STORED:
        return _cut(buffer, HEADER + start, HEADER + stop)
    if size <= 0 or start >= stop:
        raise ValueError(f"expected blocks of at least 1 byte, found {size}")
    first, last, blocks = start // size, -(-stop // size), -(-total // size)
    if last == blocks and buffer[TYPE_SIZE] > 1:
        # Blosc encodes a shorter last block in another way than the others, but not if it is the only block of a
        # buffer: include the block before it.
        first = max(0, min(first, last - 2))
    if (first, last) == (0, blocks):
        return _cut(np.frombuffer(_BLOSC.decode(buffer), np.uint8), start, stop)
    part = _blocks(buffer, first, last, blocks)
    held = min(last * size, total) - first * size
    part[SIZES] = np.array([held, min(size, held), len(part)], "<u4").view(np.uint8)
    return _cut(np.frombuffer(_BLOSC.decode(part), np.uint8), start - first * size, stop - first * size)


def _blocks(buffer: Bytes, first: int, last: int, blocks: int) -> Bytes:
    """A buffer of the blocks [first, last); its header still has the sizes of the whole buffer."""
    starts = _words(_cut(buffer, HEADER, HEADER + 4 * blocks)).astype(np.int64)
    # A block ends where another begins, or with the buffer.
    ends = np.append(np.sort(starts), len(buffer))
    taken = starts[first:last]
    stops = ends[np.searchsorted(ends, taken, "right")] if taken.max() < len(buffer) else taken
    pieces = [_cut(buffer, int(a), int(b)) for a, b in zip(taken, stops, strict=True)]
    table = HEADER + 4 * len(pieces) + np.cumsum([0, *(len(piece) for piece in pieces[:-1])])
    return np.concatenate([buffer[:HEADER], table.astype("<u4").view(np.uint8), *pieces])


def _words(data: Bytes) -> npt.NDArray[np.uint32]:
    return np.ascontiguousarray(data).view("<u4")


def _cut(data: Bytes, start: int, stop: int) -> Bytes:
    if not 0 <= start < stop <= len(data):
        raise ValueError(f"expected bytes {start} to {stop} in {len(data)}")
    return data[start:stop]
