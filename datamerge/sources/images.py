"""From an encoded image to 8-bit pixels, the way CLIP's evaluation does it (PAPER §4)."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

# A 1 × 60,000 strip is a small file, but the image that fills 224 × 224 has 3 billion pixels before the crop.
MAX_RESIZED_PIXELS = 50_000_000
BAND = 256  # rows

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")


class BadImage(Exception):  # noqa: N818
    """An image that cannot be used; the message is the reason that goes into the artifact."""


def decode(data: bytes | Image.Image, shape: tuple[int, int, int], resize: bool = True) -> npt.NDArray[np.uint8]:
    """Decode, convert to grey (C = 1) or RGB (C = 3), resize and crop; uint8 [C, H, W].

    The shorter side is resized to fill H×W (bicubic, antialiased) and the centre cropped; an image that already
    has the size is left alone. Transparency is dropped as `PIL.Image.convert` drops it, like torchvision's
    ImageFolder.

    Raises:
        BadImage: not an image, cut short, or absurdly large or narrow; of another size, without `resize`.
    """
    channels, height, width = shape
    with _opened(data) as image:
        if not resize and image.size != (width, height):
            raise BadImage(f"expected {width}x{height} pixels, found {image.width}x{image.height}")
        pixels = _to_8_bit(image).convert("L" if channels == 1 else "RGB")
    array = np.asarray(_resize_and_crop(pixels, height, width))
    return np.ascontiguousarray(array[None] if channels == 1 else array.transpose(2, 0, 1))


@contextmanager
def _opened(data: bytes | Image.Image) -> Iterator[Image.Image]:
    """An image whose pixels may not be decoded yet; whatever PIL has against it becomes BadImage."""
    if isinstance(data, Image.Image):
        yield data
        return
    try:
        with warnings.catch_warnings():
            # A palette with transparency only warns; a decompression bomb is refused.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                yield image
    except UnidentifiedImageError:
        raise BadImage(f"not an image ({len(data)} bytes)") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise BadImage("larger than any photo: refused as a decompression bomb") from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise BadImage(f"broken image: {error}") from None


@cache
def _formats() -> tuple[str, ...]:
    """Formats of photos that this Pillow reads. Others may start a program: EPS starts Ghostscript."""
    Image.init()
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


def _resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    if image.size == (width, height):
        return image
    # The longer side is truncated to an integer, as torchvision's Resize does.
    if image.width * height <= image.height * width:
        size = (width, image.height * width // image.width)
    else:
        size = (image.width * height // image.height, height)
    if size[0] * size[1] > MAX_RESIZED_PIXELS:
        raise BadImage(f"{image.width}x{image.height} pixels: too narrow to fill {width}x{height}")
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)
    return resized.crop((left, top, left + width, top + height))


def native_shape(data: bytes | Image.Image) -> tuple[int, int, int]:
    """(C, H, W) of an image without decoding its pixels; C is 1 for greys, else 3.

    Raises:
        BadImage: not an image, or absurdly large.
    """
    with _opened(data) as image:
        grey = image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")
        return (1 if grey else 3, image.height, image.width)
