"""Decompression with a limit against decompression bombs."""

from __future__ import annotations

import gzip
import io
import zlib

# Images of one colour compress to a thousandth, so only large results with a high ratio are refused.
MAX_UNPACKED, MAX_RATIO = 2**28, 200


def refuse_bomb(size: int, stored: int) -> None:
    """Raise ValueError if `stored` bytes unpack to `size` bytes, far more than images would."""
    if size > MAX_UNPACKED and size > MAX_RATIO * stored:
        raise ValueError(f"{stored} bytes unpack to {size} or more: refused as a decompression bomb")


def gunzip(data: bytes) -> bytes:
    """The content of a gzip file.

    Raises:
        ValueError: the file is a decompression bomb, or its data are broken.
        OSError, EOFError: the file is not gzip, or truncated.
    """
    limit = max(MAX_UNPACKED, MAX_RATIO * len(data))
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            unpacked = stream.read(limit + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    refuse_bomb(len(unpacked), len(data))
    return unpacked
