"""Encoded bytes to 8-bit pixels: torchvision's geometry, every mode of PIL, and one error for all bad images."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import BadImage, decode, native_shape
from storage_schemas.schema.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

RNG = np.random.default_rng(5)
NOISE = RNG.integers(0, 256, (13, 11, 4)).astype(np.uint8)


def _encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3)).astype(np.uint8))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_lossless_modes_convert_as_pil_does(mode: str, channels: int) -> None:
    """Without resizing, the pixels equal PIL's conversion; transparency is dropped, not blended."""
    image = Image.fromarray(NOISE, "RGBA" if mode == "RGBA" else None).convert(mode)
    pixels = decode(_encode(image), Preprocessing(shape=(channels, 13, 11)))
    expected = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, expected[None] if channels == 1 else expected.transpose(2, 0, 1))


def test_transparent_pixels_keep_their_colour() -> None:
    pixels = NOISE.copy()
    pixels[..., 3] = 0
    np.testing.assert_array_equal(
        decode(_encode(Image.fromarray(pixels, "RGBA")), Preprocessing(shape=(3, 13, 11))),
        NOISE[..., :3].transpose(2, 0, 1),
    )


def test_palette_with_transparency() -> None:
    image = Image.fromarray(NOISE[..., 0]).convert("P")
    data = _encode(image, transparency=b"\x00\x80" * 128)
    np.testing.assert_array_equal(decode(data, Preprocessing(shape=(1, 13, 11)))[0], NOISE[..., 0])


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    pixels = decode(_encode(image, "JPEG", quality=100), Preprocessing(shape=(3, 8, 8)))
    assert pixels[0].max() <= 2
    assert pixels[1:].min() >= 253


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    levels = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    pixels = decode(_encode(Image.fromarray(levels)), Preprocessing(shape=(1, 1, 6)))
    assert pixels.ravel().tolist() == [0, 0, 1, 1, 128, 255]
    assert decode(_encode(Image.fromarray(levels), "TIFF"), Preprocessing(shape=(3, 1, 6)))[2].ravel().tolist() == [
        0,
        0,
        1,
        1,
        128,
        255,
    ]


def test_one_pixel_fills_the_picture() -> None:
    pixels = decode(_encode(Image.new("RGB", (1, 1), (7, 8, 9))), Preprocessing(shape=(3, 5, 4)))
    assert pixels.shape == (3, 5, 4)
    for channel, value in enumerate((7, 8, 9)):
        assert (pixels[channel] == value).all()


@pytest.mark.parametrize("size", [16, 17])
@pytest.mark.parametrize(
    ("height", "width"),
    [(40, 40), (33, 50), (50, 33), (16, 31), (31, 17), (17, 16), (7, 9), (5, 90), (90, 5), (257, 64), (16, 16)],
)
def test_geometry_is_torchvisions_resize_and_centre_crop(height: int, width: int, size: int) -> None:
    make_torchvision_importable()
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    image = _noise(height, width)
    transform = Compose([Resize(size, InterpolationMode.BICUBIC), CenterCrop(size)])
    expected = np.asarray(transform(image)).transpose(2, 0, 1)
    np.testing.assert_array_equal(decode(_encode(image), Preprocessing(shape=(3, size, size))), expected)


@pytest.mark.parametrize(("height", "width"), [(20, 40), (40, 20), (9, 9), (100, 31), (8, 6), (16, 12)])
def test_a_constant_image_fills_any_target_shape(height: int, width: int) -> None:
    pixels = decode(_encode(Image.new("RGB", (width, height), (10, 20, 30))), Preprocessing(shape=(3, 8, 6)))
    assert pixels.shape == (3, 8, 6)
    assert [np.unique(channel).tolist() for channel in pixels] == [[10], [20], [30]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"\b0\b"),
        (b"just some text in a file called photo.jpg", r"\b41\b"),
        (b"\x89PNG\r\n\x1a\n", r"\b8\b|broken"),
        (_encode(_noise(64, 64), "JPEG")[:-800], "truncated"),
        (_encode(_noise(64, 64), "PNG")[:-3000], "broken"),
        (b"GIF89a" + bytes(20), r"\b26\b|broken"),
    ],
    ids=["empty", "text", "signature only", "cut JPEG", "cut PNG", "hollow GIF"],
)
def test_bad_images_have_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode(data, Preprocessing(shape=(3, 8, 8)))
    assert str(caught.value)
    assert "\n" not in str(caught.value)
    assert " at 0x" not in str(caught.value)  # the reason is stored in the artifact, which has to be reproducible


@pytest.mark.parametrize("factor", [1.5, 3])
def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Above PIL's limit, where it only warns, and above twice the limit, where it raises."""
    data = _encode(_noise(30, 30))
    decode(data, Preprocessing(shape=(3, 8, 8)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(900 / factor))
    with pytest.raises(BadImage, match="bomb"):
        decode(data, Preprocessing(shape=(3, 8, 8)))


def test_a_strip_that_resizing_would_blow_up_is_refused() -> None:
    """1 × 60,000 pixels are a small file; filling 224 × 224 with them would need 3 billion."""
    for size in ((1, 60_000), (60_000, 1)):
        data = _encode(Image.new("L", size))
        with pytest.raises(BadImage, match=r"60000"):
            decode(data, Preprocessing(shape=(3, 224, 224)))


def _samples() -> list[tuple[str, bytes]]:
    image = Image.fromarray(NOISE[..., :3])
    kinds = [("PNG", "RGB"), ("PNG", "P"), ("JPEG", "RGB"), ("GIF", "P"), ("WEBP", "RGB"), ("TIFF", "RGB")]
    return [(kind, _encode(image.convert(mode), kind)) for kind, mode in [*kinds, ("BMP", "RGB"), ("PPM", "L")]]


@pytest.mark.parametrize(("kind", "data"), _samples(), ids=lambda value: value if isinstance(value, str) else "")
def test_damaged_images_are_decoded_or_raise_bad_image(kind: str, data: bytes) -> None:
    """A bit flipped in each byte of the header, or the end cut off: pixels of the right shape, or BadImage."""
    rng = np.random.default_rng(len(data))
    damaged = [data[: int(cut)] for cut in np.linspace(0, len(data) - 1, 40)]
    for position in [*range(min(len(data), 60)), *rng.integers(0, len(data), 60)]:
        copy = bytearray(data)
        copy[position] ^= 1 << int(rng.integers(8))
        damaged.append(bytes(copy))
    good = 0
    for variant in damaged:
        try:
            assert decode(variant, Preprocessing(shape=(3, 6, 7))).shape == (3, 6, 7)
            good += 1
        except BadImage:
            pass
        try:
            assert len(native_shape(variant)) == 3
        except BadImage:
            pass
    assert good < len(damaged), kind


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("LA", 1), ("1", 1), ("I;16", 1), ("RGB", 3), ("RGBA", 3), ("P", 3)]
)
def test_native_shape(mode: str, channels: int) -> None:
    image = (
        Image.fromarray(NOISE[..., 0].astype(np.uint16)) if mode == "I;16" else Image.fromarray(NOISE).convert(mode)
    )
    assert native_shape(_encode(image)) == (channels, 13, 11)


@pytest.mark.parametrize("data", [b"", b"text", b"\x89PNG\r\n\x1a\n", b"P5\n2x 2\n255\n1234"])
def test_native_shape_refuses_data_that_are_not_an_image(data: bytes) -> None:
    with pytest.raises(BadImage) as caught:
        native_shape(data)
    assert " at 0x" not in str(caught.value)


def test_native_shape_refuses_decompression_bombs(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _encode(_noise(30, 30))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match="bomb"):
            native_shape(data)
