"""Decompression that ends before memory does."""

from __future__ import annotations

import gzip
import io
import zlib

# Pictures of one colour shrink to a thousandth; a few of them are no harm.
MAX_UNPACKED, MAX_RATIO = 2**28, 200


def refuse_bomb(size: int, stored: int) -> None:
    """Raises ValueError for data that becomes so much larger that it cannot be images."""
    if size > MAX_UNPACKED and size > MAX_RATIO * stored:
        raise ValueError(f"{stored} bytes unpack to {size} or more: refused as a decompression bomb")


def gunzip(data: bytes) -> bytes:
    """The contents of a gzip file.

    Raises:
        ValueError: a bomb, or broken data within.
        OSError, EOFError: no gzip file, or one that is cut short.
    """
    limit = max(MAX_UNPACKED, MAX_RATIO * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            unpacked = stream.read(limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    refuse_bomb(len(unpacked), len(data))
    return unpacked
