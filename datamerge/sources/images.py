"""From an encoded image to 8-bit pixels, the way the libraries that encoders come from do it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from datamerge.sources.suffixes import register_heif
from storage_schemas.schema.preprocessing import Preprocessing

# A 1 × 60,000 strip is a small file, but the image that fills 224 × 224 has 3 billion pixels before the crop.
MAX_RESIZED_PIXELS = 50_000_000
BAND = 256  # rows

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO", "HEIF")


class BadImage(Exception):  # noqa: N818
    """An image that cannot be used; the message is the reason that goes into the artifact."""


def decode(data: bytes | Image.Image, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Decode, convert to grey (C = 1) or RGB (C = 3), resize, crop or pad; uint8 [C, H, W], not normalised.

    Images are converted before they are resized, as torchvision's ImageFolder and timm do.

    Args:
        data: a file, or an image.
        preprocessing: which pixels to make of it.

    Raises:
        BadImage: not an image, cut short, or absurdly large or narrow; of another size where none is resized.
    """
    channels, height, width = preprocessing.shape
    with opened(data) as image:
        if preprocessing.resize == "none" and image.size != (width, height):
            raise BadImage(f"expected {width}x{height} pixels, found {image.width}x{image.height}")
        eight = _to_8_bit(image)
        opaque = _on_white(eight) if preprocessing.alpha == "white" else eight
        pixels = opaque.convert("L" if channels == 1 else "RGB")
    array = np.asarray(_crop_or_pad(_resized(pixels, preprocessing), preprocessing))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


@contextmanager
def opened(data: bytes | Image.Image) -> Iterator[Image.Image]:
    """An image whose pixels may not be decoded yet; whatever PIL has against it becomes BadImage."""
    try:
        if isinstance(data, Image.Image):
            yield data  # maybe of a file whose pixels are not read yet
            return
        with warnings.catch_warnings():
            # A palette with transparency only warns; a decompression bomb is refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                yield image
    except UnidentifiedImageError:
        size = f" ({len(data)} bytes)" if isinstance(data, bytes) else ""
        raise BadImage(f"not an image{size}") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImage("larger than any photo: refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise BadImage(f"broken image: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Formats of photos that this Pillow reads. Others may start a program: EPS starts Ghostscript."""
    Image.init()
    register_heif()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16-bit greys would be clipped by PIL's conversion, not scaled."""
    if image.mode.startswith("I;16") or image.mode == "I":
        wide = np.asarray(image)
        narrow = np.empty(wide.shape, np.uint8)
        for top in range(0, len(wide), BAND):  # a scan may be large
            band = wide[top : top + BAND].clip(0, 65535).astype(np.uint32)
            narrow[top : top + BAND] = (band + 128) // 257  # the nearest; no value of 16 bits is between two
        return Image.fromarray(narrow)
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Composited on white if it has any transparency, as transformers' convert_to_rgb."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    size = _scaled_size(image, preprocessing)
    if size == image.size:
        return image
    # Fitted to the longer side, the other one of a strip may come out as 0.
    if 0 in size or size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels: too narrow, they would become {size[0]}x{size[1]}")
    return image.resize(size, Image.Resampling[preprocessing.interpolation.upper()])


def _scaled_size(image: Image.Image, preprocessing: Preprocessing) -> tuple[int, int]:
    """(W, H) that an image is resized to, as the libraries compute it, down to the last bit of their floats."""
    (width, height), (to_height, to_width) = image.size, preprocessing.scale
    if preprocessing.resize == "none":
        return image.size
    if preprocessing.resize == "squash":
        return to_width, to_height
    if preprocessing.rounding == "nearest":
        choose = min if preprocessing.resize == "shortest" else max
        ratio = choose(height / to_height, width / to_width)
        return round(width / ratio), round(height / ratio)
    # Whether the width is the side that is fitted: the shorter one in units of the scale, or the longer one.
    narrow = width * to_height <= height * to_width
    if narrow == (preprocessing.resize == "shortest"):
        return to_width, height * to_width // width
    return width * to_height // height, to_height


def _crop_or_pad(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """The centre, with a margin where the image is smaller: the smaller half of it above and to the left."""
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


def native_shape(data: bytes | Image.Image) -> tuple[int, int, int]:
    """(C, H, W) of an image without decoding its pixels; C is 1 for greys, else 3.

    Raises:
        BadImage: not an image, or absurdly large.
    """
    with opened(data) as image:
        grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        return (1 if grey else 3, image.height, image.width)
