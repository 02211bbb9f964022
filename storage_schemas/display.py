"""The repr of artifacts and records: one line in a console, a table with a picture in a notebook.

PNG files are encoded here, so that reading an artifact needs no image library.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Mapping
from html import escape

import numpy as np
import numpy.typing as npt

from storage_schemas.errors import printable

Pixels = npt.NDArray[np.uint8]

LARGEST_SIDE = 512  # of a picture in a notebook, in pixels
# Black-red-yellow-white, readable in grey and by colour-blind eyes.
_HEAT = np.array([[0, 0, 0], [150, 0, 0], [255, 120, 0], [255, 230, 80], [255, 255, 255]], np.float64)


def one_line(thing: object, name: str, *facts: object) -> str:
    """`<Artifact s3://bucket/a: 7 groups, …>`, with control characters escaped."""
    return printable(f"<{type(thing).__name__} {name}".rstrip() + f": {', '.join(map(str, facts))}>")


def table(title: str, facts: Mapping[str, object], picture: bytes = b"") -> str:
    """An HTML table with one row per fact and an optional PNG file below it; all texts are escaped."""
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(fact)}</td></tr>" for name, fact in facts.items())
    style = "min-height: 8em; max-width: 100%; image-rendering: pixelated"
    source = f"data:image/png;base64,{b64encode(picture).decode()}"
    image = f'<img alt="" style="{style}" src="{source}">' if picture else ""
    return f"<div><b>{_text(title)}</b><table>{rows}</table>{image}</div>"


def mean_and_variance(mean: npt.NDArray[np.floating], variance: npt.NDArray[np.floating]) -> bytes:
    """A PNG file of two images [C, H, W] in [0, 1], the second as a heat map; large ones are subsampled."""
    step = -(-max(mean.shape[1:]) // LARGEST_SIDE)
    pixels = (255 * np.clip(mean[:, ::step, ::step], 0, 1)).round().astype(np.uint8)
    return _png(np.hstack([rgb(pixels), heat(variance[:, ::step, ::step].mean(axis=0))]))


def rgb(pixels: Pixels) -> Pixels:
    """RGB pixels, uint8 [H, W, 3], of an image [C, H, W]; only its first channel if C is neither 1 nor 3."""
    if pixels.shape[0] not in (1, 3):
        pixels = pixels[:1]
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def heat(values: npt.NDArray[np.floating]) -> Pixels:
    """A heat map, uint8 [H, W, 3], of values [H, W], scaled from 0 to their maximum."""
    scaled = values / max(float(values.max()), 1e-12) * (len(_HEAT) - 1)
    channels = [np.interp(scaled, np.arange(len(_HEAT)), _HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _text(foreign: object) -> str:
    return escape(printable(str(foreign)))


def _png(pixels: Pixels) -> bytes:
    """A PNG file of uint8 [H, W, 3]; each row begins with a zero for "no filter"."""
    height, width, _ = pixels.shape
    rows = np.pad(pixels.reshape(height, 3 * width), ((0, 0), (1, 0)))
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes()), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks.items()
    )
