"""Converts images of more than 8 bits to 8 bits, by the range that the file declares; others are refused.

    16-bit greys               0 … 65535, the depth that PNG, TIFF, PPM or JPEG 2000 declare; 12-bit TIFFs 0 … 4095
    TIFF with a range          its tags SMinSampleValue and SMaxSampleValue, whatever the type of the samples
    floats, 32 bits, signed    refused without these tags, as black and white are unknown
    16-bit colour              Pillow keeps the upper 8 bits of each sample

A 16-bit image whose values all fit into 8 bits is refused too, unless the tags declare a range: it would become
black, and is more likely an 8-bit image stored in 16 bits. An image of zeros is black either way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

BAND = 256  # rows converted at a time, as a scan may be large
FULL = 65535
GREY_LEVELS = 255
# A 16-bit image that uses less than this share of its range is reported as dark.
DARK = 1 / 4
DARK_REMARK = "dark"

_BITS, _PHOTOMETRIC, _SAMPLE_FORMAT, _LOWEST, _HIGHEST = 258, 262, 339, 340, 341  # TIFF's tags
_UNSIGNED, _SIGNED = 1, 2
_WHITE_IS_ZERO = 0
_SIZ = b"\xff\x4f\xff\x51"  # JPEG 2000: start of codestream, and its sizes
_REMEDY = "store 8 bits, or declare the range in TIFF's SMinSampleValue and SMaxSampleValue"
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


class BadImage(Exception):
    """An unusable image; the message is the reason that the artifact records."""


def is_wide(mode: str) -> bool:
    """Whether a mode of Pillow has grey samples of more than 8 bits."""
    return mode in ("I", "F") or mode.startswith("I;16")


def bits(image: Image.Image) -> int:
    """Bits per sample that a file declares, at least 8; call it before the pixels are loaded."""
    if is_wide(image.mode):
        return 32 if image.mode in ("I", "F") and image.format not in ("PPM", "PNG") else 16
    tiles = getattr(image, "tile", None)
    parameters = tiles[0][3] if tiles else None
    if image.format == "PNG":
        return 16 if ";16" in str(parameters) else 8
    if image.format == "PPM":
        largest = parameters[-1] if isinstance(parameters, tuple) else 0
        return 16 if isinstance(largest, int) and largest > GREY_LEVELS else 8
    if image.format == "TIFF":
        return _tiff_bits(image, 8)
    if image.format == "JPEG2000":
        return _jpeg_2000_bits(image)
    return 8


def _jpeg_2000_bits(image: Image.Image) -> int:
    """Bits of the first component, from the header of the codestream, 38 bytes after its marker."""
    file: Any = getattr(image, "fp", None)
    if file is None:
        return 8
    before = file.tell()
    file.seek(0)
    head = file.read(65536)
    file.seek(before)
    at = head.find(_SIZ)
    depth = head[at + 42 : at + 43] if at >= 0 else b""
    return max(8, (depth[0] & 0x7F) + 1) if depth else 8


def to_8_bits(image: Image.Image, declared_bits: int, remarks: list[str] | None = None) -> Image.Image:
    """Convert an image to a mode with 8 bits per sample, which Pillow can convert to grey and to RGB.

    Args:
        image: image, loaded or not.
        declared_bits: result of `bits` before the image was loaded.
        remarks: receives `DARK_REMARK` if the image is dark and declares no range.

    Raises:
        BadImage: the range of the values is unknown, or values are outside the declared range.
    """
    if is_wide(image.mode):
        return _narrowed(image, remarks)
    if declared_bits > 8:
        _check_colour(image, declared_bits, remarks)
        _narrow_transparency(image)
    if image.mode == "L" and _numbers(image, _SAMPLE_FORMAT) == (_SIGNED,):
        raise BadImage("signed integers of 8 bits, which Pillow reads as unsigned; store unsigned ones")
    if image.mode in _PREMULTIPLIED:
        return image.convert(_PREMULTIPLIED[image.mode])
    return image.convert("RGB") if image.mode == "LAB" else image  # Pillow converts LAB to RGB only


def _narrowed(image: Image.Image, remarks: list[str] | None) -> Image.Image:
    wide = np.asarray(image)
    lowest, highest = wide.min().item(), wide.max().item()  # both are NaN if any value is
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise BadImage(f"floats that are not finite; {_REMEDY}")
    declared = _declared_range(image)
    low, high = declared or _usual_range(image, lowest, highest)
    slack = 1e-6 * (high - low)
    if lowest < low - slack or highest > high + slack:
        raise BadImage(f"values from {lowest:g} to {highest:g}, but its range is declared as {low:g} to {high:g}")
    if declared is None:
        _check_use(highest, round(high), remarks)
    narrow = np.empty(wide.shape, np.uint8)
    for rows, band in _bands(wide):
        scaled = (band.astype(np.float64) - low) * (GREY_LEVELS / (high - low))
        narrow[rows] = np.rint(scaled).clip(0, GREY_LEVELS)
    if _numbers(image, _PHOTOMETRIC) == (_WHITE_IS_ZERO,):
        narrow = GREY_LEVELS - narrow
    eight = Image.fromarray(narrow)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(wide == transparent, 0, 255).astype(np.uint8)
        eight = Image.merge("LA", (eight, Image.fromarray(alpha)))
    return eight


def _bands(wide: npt.NDArray[Any]) -> Iterator[tuple[slice, npt.NDArray[Any]]]:
    for top in range(0, len(wide), BAND):
        rows = slice(top, top + BAND)
        yield rows, wide[rows]


def _usual_range(image: Image.Image, lowest: float, highest: float) -> tuple[float, float]:
    """The full range of 16-bit samples, for files that declare no other.

    Raises:
        BadImage: the samples are of another type.
    """
    if image.format in ("PPM", "PNG") and image.mode == "I":
        return 0, FULL  # Pillow scales to it
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "signed or 32-bit integers"
        raise BadImage(f"{kind} from {lowest:g} to {highest:g} without a declared range; {_REMEDY}")
    return 0, 2 ** min(16, _tiff_bits(image, 16)) - 1


def _declared_range(image: Image.Image) -> tuple[float, float] | None:
    """The range from TIFF's tags, if any; a missing end is that of the sample type, as TIFF specifies.

    Raises:
        BadImage: the range is empty.
    """
    lowest, highest = _numbers(image, _LOWEST), _numbers(image, _HIGHEST)
    if not lowest and not highest:
        return None
    if (not lowest or not highest) and _numbers(image, _SAMPLE_FORMAT) not in ((), (_UNSIGNED,)):
        return None
    low, high = min(lowest, default=0.0), max(highest, default=2.0 ** _tiff_bits(image, 16) - 1)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise BadImage(f"declares a range of values from {low:g} to {high:g}; store 8 bits")
    return low, high


def _check_colour(image: Image.Image, declared_bits: int, remarks: list[str] | None) -> None:
    """Refuse colours that the upper 8 bits, all that Pillow reads, do not represent."""
    declared = _declared_range(image)
    if declared is not None and declared != (0, 2**declared_bits - 1):
        raise BadImage(
            f"{declared_bits}-bit colour with values declared as {declared[0]:g} to {declared[1]:g}, of which Pillow "
            "reads the upper 8 bits alone; store 8 bits"
        )
    if declared is not None or image.mode == "CMYK":
        return
    ranges: Any = [image.getchannel(band).getextrema() for band in image.getbands() if band != "A"]
    highest = max(high for _, high in ranges)
    if highest <= (1 if image.format == "PPM" else 0):  # Pillow rounds the values of PPM
        raise BadImage(
            f"{declared_bits} bits a sample, and all values in the lowest 8: black, or an 8-bit image in more bits; "
            "store 8 bits"
        )
    if highest < DARK * GREY_LEVELS and remarks is not None:
        remarks.append(DARK_REMARK)


def _check_use(highest: float, high: int, remarks: list[str] | None) -> None:
    """Refuse greys that would all become black, if the file declares only the number of bits."""
    if 0 < highest <= high >> 8:
        raise BadImage(
            f"{high.bit_length()} bits a sample, and no value above {highest:g}: black, or an 8-bit image in more "
            f"bits; {_REMEDY}"
        )
    if 0 < highest < DARK * high and remarks is not None:
        remarks.append(DARK_REMARK)


def _narrow_transparency(image: Image.Image) -> None:
    """Convert the transparent colour of a PNG from 16 to 8 bits, as Pillow has read the upper 8 of the pixels."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _tiff_bits(image: Image.Image, otherwise: int) -> int:
    return int(min(64, max((8, *(_numbers(image, _BITS) or (otherwise,))))))


def _numbers(image: Image.Image, tag: int) -> tuple[float, ...]:
    """The values of a TIFF tag; empty for other formats.

    Raises:
        BadImage: the values are not numbers.
    """
    tags: Any = getattr(image, "tag_v2", None)
    value = () if tags is None else tags.get(tag, ())
    try:
        return tuple(float(number) for number in (value if isinstance(value, (tuple, list)) else (value,)))
    except (TypeError, ValueError, ArithmeticError):
        raise BadImage(f"expected numbers in TIFF's tag {tag}, found {value!r:.80}") from None
