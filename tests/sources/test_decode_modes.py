"""Pixels of every mode and file format that Pillow opens equal those of the conversions that libraries use."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms

from datamerge.evaluation.llava.images import read_image
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import BadImage, decode
from storage_schemas.schema.preprocessing import Preprocessing

make_torchvision_importable()

from transformers.image_transforms import convert_to_rgb  # noqa: E402 - it imports torchvision

SIZE = (11, 13)
NOISE = np.random.default_rng(5).integers(0, 256, (13, 11, 4)).astype(np.uint8)
COLOURS = Image.fromarray(NOISE[..., :3])


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _decoded(data: bytes | Image.Image, channels: int = 3, **settings: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    pixels = decode(data, Preprocessing(shape=(channels, *SIZE[::-1]), **settings))
    return pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)


def _opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def _with_alpha(mode: str) -> Image.Image:
    return Image.fromarray(NOISE, "RGBA").convert(mode)


def _palette_with_alpha() -> Image.Image:
    image = Image.new("PA", SIZE)
    image.putpalette(list(range(256)) * 3)
    image.putdata([(int(a), int(b)) for a, b in NOISE[..., :2].reshape(-1, 2)])
    return image


def _lab() -> Image.Image:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(COLOURS, to_lab)
    assert lab is not None
    return lab


def _adobe_inverted() -> bytes:
    """Inverted, as Photoshop writes CMYK; Pillow writes and reads the Adobe segment that says so."""
    data = _encode(COLOURS.convert("CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    return data


def _premultiplied() -> bytes:
    """A TIFF whose ExtraSamples declare colours multiplied by alpha; Pillow divides them by alpha."""
    data = _encode(_with_alpha("RGBA"), "TIFF")
    straight, multiplied = (struct.pack("<HHIH", 338, 3, 1, kind) for kind in (2, 1))
    assert data.count(straight) == 1
    return data.replace(straight, multiplied)


FILES = {
    "grey TIFF": _encode(COLOURS.convert("L"), "TIFF"),
    "bilevel TIFF": _encode(COLOURS.convert("1"), "TIFF", compression="group4"),
    "bilevel PNG": _encode(COLOURS.convert("1"), "PNG"),
    "palette PNG": _encode(COLOURS.quantize(16), "PNG"),
    "palette TIFF": _encode(COLOURS.quantize(256), "TIFF"),
    "palette GIF": _encode(COLOURS.quantize(200), "GIF"),
    "palette with transparency, PNG": _encode(COLOURS.quantize(200), "PNG", transparency=b"\0\x80" * 100),
    "palette with one transparent colour": _encode(COLOURS.quantize(200), "PNG", transparency=7),
    "grey with a transparent level": _encode(COLOURS.convert("L"), "PNG", transparency=int(NOISE[0, 0, 0])),
    "colours with a transparent one": _encode(COLOURS, "PNG", transparency=(1, 2, 3)),
    "grey and alpha": _encode(_with_alpha("LA"), "PNG"),
    "RGBA": _encode(_with_alpha("RGBA"), "PNG"),
    "RGBA, WebP": _encode(_with_alpha("RGBA"), "WEBP", lossless=True, exact=True),
    "RGBA, premultiplied TIFF": _premultiplied(),
    "CMYK JPEG": _adobe_inverted(),
    "CMYK TIFF": _encode(COLOURS.convert("CMYK"), "TIFF"),
    # Pillow 12 writes a file of this form that it cannot read.
    **({"YCbCr TIFF": _encode(COLOURS.convert("YCbCr"), "TIFF")} if PIL.__version__ >= "13" else {}),
    "LAB TIFF": _encode(_lab(), "TIFF"),
    "JPEG 2000": _encode(COLOURS, "JPEG2000"),
    "AVIF": _encode(COLOURS, "AVIF"),
    "TGA": _encode(_with_alpha("RGBA"), "TGA"),
    "ICO": _encode(_with_alpha("RGBA").resize((16, 16)), "ICO", sizes=[(16, 16)]),
    "PPM": _encode(COLOURS, "PPM"),
    "BMP": _encode(COLOURS, "BMP"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in FILES.items()])
def test_colours_equal_pillows_conversion(data: bytes) -> None:
    """torchvision's ImageFolder, webdataset and open_clip use it; transparent pixels keep their colours."""
    image = _opened(data)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(
        decode(data, Preprocessing(shape=(3, *expected.shape[:2]))), expected.transpose(2, 0, 1)
    )
    grey = (image.convert("RGB") if image.mode == "LAB" else image).convert("L")
    np.testing.assert_array_equal(decode(data, Preprocessing(shape=(1, *expected.shape[:2])))[0], np.asarray(grey))


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in FILES.items() if name != "LAB TIFF"])
def test_transparency_on_white_equals_transformers(data: bytes) -> None:
    """transformers drops the transparency of RGB images; here it counts as in every other mode."""
    image = _opened(data)
    if image.mode == "RGB" and "transparency" in image.info:
        image = image.convert("RGBA")
    expected = np.asarray(_on_white(image))
    pixels = decode(data, Preprocessing(shape=(3, *expected.shape[:2]), alpha="white"))
    np.testing.assert_array_equal(pixels, expected.transpose(2, 0, 1))


def _on_white(image: Image.Image) -> Image.Image:
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    converted = convert_to_rgb(image)
    assert isinstance(converted, Image.Image)
    return converted.convert("RGB")


@pytest.mark.parametrize(
    "mode", ["RGBa", "La", "PA", "RGBX", "HSV", "YCbCr", "LAB", "CMYK", "1", "P", "I;16B", "I;16N"]
)
def test_modes_of_images_from_custom_data_sets(mode: str) -> None:
    """Custom data sets may return images of any mode; premultiplied colours are divided by alpha."""
    if mode.startswith("I;16"):
        wide = np.asarray(NOISE[..., 0], np.uint16) * 257
        image = Image.frombytes(mode, SIZE, wide.astype(">u2" if mode.endswith("B") else "=u2").tobytes())
        np.testing.assert_array_equal(_decoded(image, 1), NOISE[..., 0])
        return
    if mode == "PA":
        image = _palette_with_alpha()
    elif mode in ("La", "RGBa"):
        image = _with_alpha({"La": "LA"}.get(mode, "RGBA")).convert(mode)
    else:
        image = _lab() if mode == "LAB" else COLOURS.convert(mode)
    straight = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, "RGB"))
    np.testing.assert_array_equal(_decoded(image), np.asarray(straight.convert("RGB")))


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    image = Image.new("RGB", SIZE, (200, 40, 90))
    data = _encode(image.convert("CMYK"), "JPEG", quality=100)
    assert np.abs(_decoded(data).astype(int) - (200, 40, 90)).max() <= 3


def test_lab_keeps_its_colours() -> None:
    assert np.abs(_decoded(FILES["LAB TIFF"]).astype(int) - NOISE[..., :3]).max() <= 24
    assert np.median(np.abs(_decoded(FILES["LAB TIFF"]).astype(int) - NOISE[..., :3])) <= 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("GIF", {}),
        ("PNG", {}),
        ("PNG", {"default_image": True}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("MPO", {"quality": 100}),
    ],
    ids=["GIF", "APNG", "APNG with a default image", "WebP", "pages of a TIFF", "MPO"],
)
def test_the_first_of_several_frames_or_pages_is_taken(kind: str, options: dict[str, Any]) -> None:
    first = COLOURS.quantize(200).convert("RGB")
    others = [Image.new("RGB", SIZE, colour) for colour in ("red", "blue")]
    data = _encode(first, kind, save_all=True, append_images=others, **options)
    image = Image.open(io.BytesIO(data))
    assert getattr(image, "n_frames", 1) >= 2
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(_decoded(data), expected)
    if kind != "MPO":
        np.testing.assert_array_equal(expected, np.asarray(first))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_colour_profiles_are_not_applied(mode: str, kind: str) -> None:
    """As in the libraries: the pixels are the same with and without a profile."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = COLOURS.convert(mode)
    with_profile = _encode(image, kind, icc_profile=profile)
    assert len(with_profile) > len(_encode(image, kind))
    np.testing.assert_array_equal(_decoded(with_profile), _decoded(_encode(image, kind)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_image_from_a_custom_data_set_is_a_bad_image(kind: str) -> None:
    """Pillow reads the pixels only when they are needed."""
    large = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    data = _encode(large, kind)
    with pytest.raises(BadImage, match=r"broken|truncated"):
        decode(Image.open(io.BytesIO(data[: len(data) // 2])), Preprocessing(shape=(3, 8, 8)))


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("name", sorted({"CMYK JPEG", "palette PNG", "RGBA", "YCbCr TIFF"} & FILES.keys()))
def test_llava_reads_the_same_pixels(name: str, fit: Any, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(FILES[name])
    preprocessing = Preprocessing(shape=(3, *SIZE[::-1]), resize="squash", mean=(0.5,), std=(0.5,))
    if fit == "crop":
        np.testing.assert_array_equal(read_image(file, preprocessing, fit), _decoded(FILES[name]).transpose(2, 0, 1))
        return
    square = Preprocessing(shape=(3, 13, 13), mean=(0.5,), std=(0.5,))
    np.testing.assert_array_equal(read_image(file, square, fit)[:, :, 1:12], _decoded(FILES[name]).transpose(2, 0, 1))
