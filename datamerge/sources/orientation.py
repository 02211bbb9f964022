"""EXIF orientation: which libraries apply it, and how.

    ignore      torchvision's ImageFolder, webdataset's decoder, img2dataset, LLaVA
    transpose   datasets.Image, since datasets 2.19

Pillow always turns TIFFs, and its plugin HEIF images, so no library sees those as they are stored.
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
    """The treatment by the library that the kind of source belongs to."""
    return "transpose" if kind in _FROM_DATASETS else "ignore"


def exif_of(setting: Exif | None, kind: str) -> Exif:
    """The treatment for a kind of source: the setting if given, else the usual one.

    Raises:
        ConfigError: the setting is given for arrays, whose pixels come from no image file.
    """
    if setting is not None and kind == "arrays":
        raise ConfigError("exif: arrays hold pixels without EXIF data; drop `exif`")
    return setting or usual_exif(kind)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright, or unknown) to 8; a PNG has to be loaded first.

    Unreadable EXIF data count as unknown, as the image itself is sound. TIFFs count as upright: Pillow turns them
    when it loads them, and reports the turned size before.
    """
    if image.format == "TIFF":
        return UPRIGHT
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except Exception:  # Pillow's parser can raise any exception
        return UPRIGHT
    return value if value in _TURNS else UPRIGHT


def turned_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """(W, H) after `turned`."""
    return size[::-1] if orientation >= 5 else size


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn an image upright, as PIL.ImageOps.exif_transpose does."""
    return image if orientation == UPRIGHT else image.transpose(_TURNS[orientation])
