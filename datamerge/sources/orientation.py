"""EXIF's orientation: which libraries turn an image by it, and the turning.

    ignore      torchvision's ImageFolder, webdataset's decoder, img2dataset, LLaVA
    transpose   datasets.Image, since datasets 2.19

Pillow turns TIFFs itself, and so does its plugin for HEIF: no library sees those as they are stored.
"""

from __future__ import annotations

from typing import Literal

from PIL import ExifTags, Image

from storage_schemas import ConfigError

Exif = Literal["transpose", "ignore"]

UPRIGHT = 1
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FROM_DATASETS = ("parquet", "arrow")


def usual_exif(kind: str) -> Exif:
    """What the library does whose layout a kind of source is."""
    return "transpose" if kind in _FROM_DATASETS else "ignore"


def exif_of(wanted: Exif | None, kind: str) -> Exif:
    """What is done about the images of a kind of source: as a user wishes, else what is usual.

    Raises:
        ConfigError: a wish for pixels that come from no file.
    """
    if wanted is not None and kind == "arrays":
        raise ConfigError("exif: arrays hold pixels without EXIF data; drop `exif`")
    return wanted or usual_exif(kind)


def orientation(image: Image.Image) -> int:
    """1 for an image that is upright or does not say, 2 to 8 as EXIF counts; of a PNG only once it is loaded.

    EXIF data that cannot be read say nothing: the image itself is sound. TIFFs are upright when they are loaded, and
    have the size of it before.
    """
    if image.format == "TIFF":
        return UPRIGHT
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # Pillow's parser raises anything
        return UPRIGHT
    return value if value in _TURNS else UPRIGHT


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(W, H) after `turned`."""
    return size[::-1] if orientation >= 5 else size


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Upright, as PIL.ImageOps.exif_transpose makes it."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])
