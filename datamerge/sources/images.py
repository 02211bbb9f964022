"""Decodes and resizes images to 8-bit pixels, exactly as the libraries of the encoders do."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from datamerge.sources.depth import DARK_REMARK, BadImage, bits, is_wide, to_8_bits
from datamerge.sources.orientation import UPRIGHT, Exif, orientation, turned, turned_size
from datamerge.sources.suffixes import register_heif
from storage_schemas.schema.preprocessing import Preprocessing

__all__ = ["BadImage", "decode", "describe_remarks", "native_shape", "opened"]

# A 1 × 60,000 strip is a small file, but scaled to fill 224 × 224 it has 3 billion pixels before the crop.
MAX_RESIZED_PIXELS = 50_000_000
TURNED_REMARK = "turned"
TIFF_MAGIC = (b"II*\0", b"MM\0*")
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "HEIF")


def decode(
    data: bytes | Image.Image, preprocessing: Preprocessing, exif: Exif = "ignore", remarks: list[str] | None = None
) -> npt.NDArray[np.uint8]:
    """Decode, convert to grey (C = 1) or RGB (C = 3), turn, resize, crop or pad; uint8 [C, H, W], not normalised.

    Images are converted before they are resized, as torchvision's ImageFolder and timm do. The first of several
    frames or pages is used; colour profiles are not applied.

    Args:
        data: content of a file, or an image.
        preprocessing: preprocessing to apply.
        exif: whether to apply the orientation in EXIF data.
        remarks: receives `DARK_REMARK`, and `TURNED_REMARK` if EXIF data turn the image, applied or not.

    Raises:
        BadImage: the data are no image, truncated, or absurdly large or narrow; the size differs and resizing is off;
            or samples have more than 8 bits and an unknown range.
    """
    channels, height, width = preprocessing.shape
    with opened(data) as image:
        # The size is known before decoding; a PNG's orientation, which may swap the sides, only afterwards.
        if preprocessing.resize == "none" and (width, height) not in (image.size, image.size[::-1]):
            raise BadImage(f"expected {width}x{height} pixels, found {image.width}x{image.height}")
        declared_bits = bits(image)
        image.load()
        facing = orientation(image)
        if facing != UPRIGHT and remarks is not None:
            remarks.append(TURNED_REMARK)
        facing = facing if exif == "transpose" else UPRIGHT
        size = turned_size(image.size, facing)
        if preprocessing.resize == "none" and size != (width, height):
            raise BadImage(f"expected {width}x{height} pixels, found {size[0]}x{size[1]}")
        eight = to_8_bits(image, declared_bits, remarks)
        opaque = _on_white(eight) if preprocessing.alpha == "white" else eight
        pixels = turned(opaque.convert("L" if channels == 1 else "RGB"), facing)
    array = np.asarray(_crop_or_pad(_resized(pixels, preprocessing), preprocessing))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


@contextmanager
def opened(data: bytes | Image.Image) -> Iterator[Image.Image]:
    """Open an image, without decoding its pixels; errors of Pillow inside the block become BadImage."""
    try:
        with warnings.catch_warnings():
            # Ignore warnings such as that about palettes with transparency, but refuse decompression bombs.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(data, Image.Image):
                yield data  # it may belong to a file, with pixels not yet read
            else:
                with Image.open(io.BytesIO(data), formats=_formats()) as image:
                    yield image
    except UnidentifiedImageError:
        raise BadImage(_unidentified(data)) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImage("larger than any photo: refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise BadImage(f"broken image: {error}") from None


def _unidentified(data: bytes | Image.Image) -> str:
    if not isinstance(data, bytes):
        return "not an image"
    if data.startswith(TIFF_MAGIC):
        return "a TIFF that is broken, or of a kind that Pillow does not read, such as colour in floats; store 8 bits"
    return f"not an image ({len(data)} bytes)"


@cache
def _formats() -> tuple[str, ...]:
    """Photo formats that this Pillow reads. Other formats are excluded: EPS would start Ghostscript."""
    Image.init()
    register_heif()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _on_white(image: Image.Image) -> Image.Image:
    """Composite an image with transparency on white, as transformers' convert_to_rgb does."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    size = _scaled_size(image, preprocessing)
    if size == image.size:
        return image
    # If the longer side of a strip is fitted, the shorter one may become 0.
    if 0 in size or size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels: too narrow, they would become {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


def _scaled_size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """(W, H) after resizing, with the floating-point arithmetic of the libraries."""
    (width, height), (to_height, to_width) = image.size, preprocessing.scale
    if preprocessing.resize == "none":
        return image.size
    if preprocessing.resize == "squash":
        return to_width, to_height
    if preprocessing.rounding == "nearest":
        choose = min if preprocessing.resize == "shortest" else max
        ratio = choose(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)
    # Whether the width is the shorter side, relative to the scale.
    narrow = width * to_height <= height * to_width
    if narrow == (preprocessing.resize == "shortest"):
        return to_width, height * to_width // width
    return width * to_height // height, to_height


def _crop_or_pad(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Crop or pad around the centre; of an odd margin, the smaller half is above or to the left."""
    height, width = preprocessing.size
    if image.size == (width, height):
        return image
    left, top = (
        -(-margin // 2) if margin < 0 else (round(margin / 2) if preprocessing.offset == "nearest" else margin // 2)
        for margin in (image.width - width, image.height - height)
    )
    if left >= 0 and top >= 0:
        return image.crop((left, top, left + width, top + height))
    fill = preprocessing.fill[0] if image.mode == "L" else preprocessing.fill
    padded = Image.new(image.mode, (width, height), fill)
    padded.paste(image, (-left, -top))
    return padded


def native_shape(data: bytes | Image.Image, exif: Exif = "ignore") -> tuple[int, int, int]:
    """(C, H, W) of an image; C is 1 for grey images, else 3. Pixels are decoded only if EXIF matters.

    Raises:
        BadImage: the data are no image, or absurdly large.
    """
    with opened(data) as image:
        grey = image.mode in ("1", "L", "LA", "La") or is_wide(image.mode)
        width, height = turned_size(image.size, orientation(image) if exif == "transpose" else UPRIGHT)
        return (1 if grey else 3, height, width)


def describe_remarks(remarks: Mapping[str, int], images: int, exif: Exif) -> list[str]:
    """A line for each kind of remark of `decode`.

    Args:
        remarks: number of images by remark.
        images: number of images that were read.
        exif: whether orientations were applied.
    """
    lines = []
    if turned_images := remarks.get(TURNED_REMARK, 0):
        done, other = ("applied", "ignore") if exif == "transpose" else ("not applied", "transpose")
        lines.append(
            f"{turned_images} of {images} images have an orientation in their EXIF data, which is {done}; "
            f'use `exif="{other}"` for the opposite'
        )
    if dark := remarks.get(DARK_REMARK, 0):
        lines.append(
            f"{dark} of {images} images of more than 8 bits use less than a quarter of their range and come out "
            "dark; if they are meant to be brighter, store 8 bits or declare the range in TIFF's SMaxSampleValue"
        )
    return lines
