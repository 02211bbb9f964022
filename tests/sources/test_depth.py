"""Images of more than 8 bits a sample, in any format, are scaled by their declared range or refused."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from datamerge.sources import BadImage, decode
from datamerge.sources.depth import DARK_REMARK
from datamerge.sources.images import describe_remarks
from storage_schemas.schema.preprocessing import Preprocessing

Array = npt.NDArray[Any]

HIGHEST = 341  # TIFF's SMaxSampleValue
GREY, RGB, GREY_ALPHA, RGBA = 0, 2, 4, 6  # PNG's colour types
LEVELS = [0, 128, 129, 257, 32768, 65535]
SCALED = [0, 0, 1, 1, 128, 255]


def _tiff(samples: Any, dtype: Any, **tags: Any) -> bytes:
    buffer = io.BytesIO()
    tags_by_number = {int(name[1:]): value for name, value in tags.items()}
    Image.fromarray(np.atleast_2d(np.asarray(samples, dtype))).save(buffer, "TIFF", tiffinfo=tags_by_number)
    return buffer.getvalue()


def _forged_tiff(samples: Array, photometric: int, depth: int, sample_format: int, channels: int = 1) -> bytes:
    """A little-endian TIFF of one strip, of a kind that no library here writes."""
    height, width = samples.shape[:2]
    strip = samples.tobytes()
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, depth if channels == 1 else 0),
        (259, 3, 1, 1),
        (262, 3, 1, photometric),
        (273, 4, 1, 0),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, len(strip)),
        (339, 3, 1, sample_format),
    ]
    depths_at = 8 + 2 + 12 * len(entries) + 4
    data_at = depths_at + 2 * channels
    directory = struct.pack("<H", len(entries))
    for tag, kind, count, value in entries:
        value = {273: data_at, 258: depths_at if channels > 2 else value}.get(tag, value)
        directory += struct.pack("<HHII", tag, kind, count, value)
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + directory
        + bytes(4)
        + struct.pack(f"<{channels}H", *[depth] * channels)
        + strip
    )


def _png(samples: Any, colour: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 16 bits a sample; Pillow writes only grey ones."""
    array = np.asarray(samples, ">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in array)
    middle = b"".join(chunk(*one) for one in chunks)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + middle
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def _jpeg_2000(samples: Any, bits: int = 16) -> bytes:
    """A lossless JPEG 2000 whose header declares `bits`, as encoders of 12-bit scanners write it."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(samples, np.uint16)).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    data = bytearray(buffer.getvalue())
    data[data.index(b"\xff\x4f\xff\x51") + 42] = bits - 1
    return bytes(data)


def _ppm(samples: Any, largest: int) -> bytes:
    array = np.atleast_2d(np.asarray(samples, ">u2" if largest > 255 else np.uint8))
    kind = b"P6" if array.ndim == 3 else b"P5"
    return kind + f"\n{array.shape[1]} {array.shape[0]}\n{largest}\n".encode() + array.tobytes()


def _twelve_bits(samples: list[int]) -> Array:
    """12-bit samples, two in three bytes."""
    text = "".join(f"{sample:012b}" for sample in samples)
    return np.array([[int(text[at : at + 8], 2) for at in range(0, len(text), 8)]], np.uint8)


def _twelve_bit_tiff(samples: list[int]) -> bytes:
    data = _forged_tiff(_twelve_bits(samples), 1, 12, 1)
    width = data.index(struct.pack("<HH", 256, 4)) + 8
    return data[:width] + struct.pack("<I", len(samples)) + data[width + 4 :]


def _grey(data: bytes | Image.Image, remarks: list[str] | None = None, channels: int = 1) -> list[int]:
    """Grey levels of an image in row order; its channels have to be equal."""
    if isinstance(data, Image.Image):
        width, height = data.size
    else:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    pixels = decode(data, Preprocessing(shape=(channels, height, width)), "ignore", remarks)
    assert (pixels == pixels[:1]).all()
    values: list[int] = pixels[0].ravel().tolist()
    return values


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(_tiff(LEVELS, np.uint16), SCALED, id="TIFF"),
        pytest.param(_tiff(LEVELS, ">u2"), SCALED, id="TIFF, big-endian"),
        pytest.param(_png([LEVELS], GREY), SCALED, id="PNG"),
        pytest.param(_ppm(LEVELS, 65535), SCALED, id="PPM"),
        pytest.param(_ppm([0, 8, 9, 2048, 4095], 4095), [0, 0, 1, 128, 255], id="PPM to 4095"),
        pytest.param(_ppm([0, 50, 100], 100), [0, 128, 255], id="PPM to 100"),
        pytest.param(_jpeg_2000([LEVELS]), SCALED, id="JPEG 2000"),
        pytest.param(_twelve_bit_tiff([0, 8, 9, 2048, 4095, 4080]), [0, 0, 1, 128, 255, 254], id="TIFF of 12 bits"),
        pytest.param(
            _forged_tiff(np.array([LEVELS], "<u2"), 0, 16, 1), [255 - one for one in SCALED], id="TIFF, white is 0"
        ),
        pytest.param(_tiff([0, 2048, 4095], np.uint16, t341=4095.0), [0, 128, 255], id="declared, to 4095"),
        pytest.param(_tiff([0, 50, 200], np.uint16, t341=255.0), [0, 50, 200], id="declared, 8 in 16 bits"),
        pytest.param(_tiff([0, 50, 200], np.uint16, t341=65535.0), [0, 0, 1], id="declared, all but black"),
        pytest.param(_tiff([1000, 2000, 3000], np.uint16, t340=1000.0, t341=3000.0), [0, 128, 255], id="declared"),
        pytest.param(_tiff([0.0, 0.5, 1.0], np.float32, t340=0.0, t341=1.0), [0, 128, 255], id="floats to 1"),
        pytest.param(_tiff([0.0, 7.0, 255.0], np.float32, t340=0.0, t341=255.0), [0, 7, 255], id="floats to 255"),
        pytest.param(_tiff([-1.0, 0.5], np.float32, t340=-1.0, t341=1.0), [0, 191], id="floats from -1"),
        pytest.param(_tiff([-1024, 0, 3071], np.int32, t340=-1024.0, t341=3071.0), [0, 64, 255], id="signed"),
        pytest.param(_tiff([0, 0, 0], np.uint16), [0, 0, 0], id="nothing but 0"),
    ],
)
def test_values_are_scaled_by_the_declared_range(data: bytes, expected: list[int], channels: int) -> None:
    assert _grey(data, channels=channels) == expected


@pytest.mark.parametrize(
    ("data", "facts"),
    [
        pytest.param(_tiff([0.5, 0.5], np.float32), ["0.5", "range", "SMaxSampleValue"], id="floats to 1"),
        pytest.param(_tiff([0.0, 255.0], np.float32), ["255", "range"], id="floats to 255"),
        pytest.param(_tiff([0.5, math.nan], np.float32, t340=0.0, t341=1.0), ["finite"], id="not a number"),
        pytest.param(_tiff([0.5, math.inf], np.float32, t340=0.0, t341=1.0), ["finite"], id="infinite"),
        pytest.param(_tiff([0.0, 2.0], np.float32, t340=0.0, t341=1.0), ["2", "0 to 1"], id="outside the range"),
        pytest.param(_tiff([0, 5000], np.uint16, t341=4095.0), ["5000", "4095"], id="integers outside the range"),
        pytest.param(_tiff([0.0, 1.0], np.float32, t341=1.0), ["range"], id="half a range of floats"),
        pytest.param(_tiff([0.0, 1.0], np.float32, t340=1.0, t341=1.0), ["from 1 to 1"], id="an empty range"),
        pytest.param(_tiff([0.0, 1.0], np.float32, t340=0.0, t341=math.nan), ["nan"], id="no range"),
        pytest.param(_tiff([200, 7], np.uint16), ["16 bits", "200"], id="8 in 16 bits, TIFF"),
        pytest.param(_tiff([255, 7], ">u2"), ["16 bits", "255"], id="8 in 16 bits, big-endian"),
        pytest.param(_png([[200, 7]], GREY), ["16 bits", "200"], id="8 in 16 bits, PNG"),
        pytest.param(_ppm([200, 7], 65535), ["16 bits", "200"], id="8 in 16 bits, PPM"),
        pytest.param(_jpeg_2000([[200, 7]]), ["16 bits", "200"], id="8 in 16 bits, JPEG 2000"),
        pytest.param(_twelve_bit_tiff([15, 3]), ["12 bits", "15"], id="4 in 12 bits"),
        pytest.param(_png([[[200] * 3]], RGB), ["16 bits"], id="8 in 16 bits, RGB"),
        pytest.param(_png([[[200] * 3 + [65535]]], RGBA), ["16 bits"], id="8 in 16 bits, RGBA"),
        pytest.param(_png([[[200, 65535]]], GREY_ALPHA), ["16 bits"], id="8 in 16 bits, grey and alpha"),
        pytest.param(_ppm(np.full((1, 2, 3), 200), 65535), ["16 bits"], id="8 in 16 bits, PPM in colour"),
        pytest.param(
            _forged_tiff(np.full((1, 2, 3), 200, "<u2"), 2, 16, 1, 3), ["16 bits"], id="8 in 16 bits, TIFF in colour"
        ),
        pytest.param(_tiff([0, 70000], np.int32), ["70000", "range"], id="32 bits"),
        pytest.param(_forged_tiff(np.array([[-5, 900]], "<i2"), 1, 16, 2), ["-5", "900"], id="signed 16 bits"),
        pytest.param(
            _forged_tiff(np.full((2, 2, 3), 0.5, "<f4"), 2, 32, 3, 3), ["Pillow", "TIFF"], id="colour in floats"
        ),
        pytest.param(_forged_tiff(np.array([[-5, 90]], "i1"), 1, 8, 2), ["signed", "8 bits"], id="signed 8 bits"),
        pytest.param(b"Pf\n2 1\n-1.0\n" + np.array([0.5, 1], "<f4").tobytes(), ["floats"], id="PFM"),
        pytest.param(Image.new("F", (2, 2), 0.5), ["0.5"], id="floats from Python"),
        pytest.param(Image.new("I", (2, 2), 90), ["90"], id="32 bits from Python"),
        pytest.param(Image.new("I;16", (2, 2), 90), ["16 bits", "90"], id="8 in 16 bits from Python"),
    ],
)
def test_values_without_a_known_range_are_refused(data: bytes | Image.Image, facts: list[str]) -> None:
    with pytest.raises(BadImage) as caught:
        decode(data, Preprocessing(shape=(3, 4, 4)))
    message = str(caught.value)
    assert [fact for fact in facts if fact not in message] == []
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "dark"),
    [
        (_tiff([0, 256], np.uint16), True),
        (_tiff([0, 4095], np.uint16), True),
        (_tiff([0, 16384], np.uint16), False),
        (_tiff([0, 4095], np.uint16, t341=65535.0), False),
        (_png([[[4095] * 3]], RGB), True),
        (_png([[[40000] * 3]], RGB), False),
        (_tiff([3, 2], np.uint8), False),
    ],
    ids=["least", "12 bits", "quarter", "declared", "colour", "bright colour", "8 bits"],
)
def test_dark_scenes_of_16_bits_are_used_and_remarked_on(data: bytes, dark: bool) -> None:
    """A dark scene looks like 12-bit values whose range is not declared."""
    remarks: list[str] = []
    _grey(data, remarks)
    assert remarks == [DARK_REMARK] * dark
    assert len(describe_remarks({DARK_REMARK: 2}, 7, "ignore")) == 1
    assert "2 of 7" in describe_remarks({DARK_REMARK: 2}, 7, "ignore")[0]


@pytest.mark.parametrize(("colour", "channels"), [(RGB, 3), (RGBA, 4), (GREY_ALPHA, 2)])
def test_colours_of_16_bits_keep_their_upper_8(colour: int, channels: int) -> None:
    samples = np.random.default_rng(0).integers(0, 65536, (5, 6, channels))
    pixels = decode(_png(samples, colour), Preprocessing(shape=(3, 5, 6)))
    colours = samples[..., :1].repeat(3, 2) if channels == 2 else samples[..., :3]
    np.testing.assert_array_equal(pixels, (colours >> 8).transpose(2, 0, 1))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_significant_bits_of_a_png_change_nothing(bits: int) -> None:
    """By the PNG standard, samples fill the whole depth whatever sBIT says."""
    assert _grey(_png([LEVELS], GREY, (b"sBIT", bytes([bits])))) == SCALED


@pytest.mark.parametrize("alpha", ["drop", "white"])
def test_a_transparent_grey_of_16_bits(alpha: Any) -> None:
    data = _png([[30000, 40000]], GREY, (b"tRNS", struct.pack(">H", 30000)))
    pixels = decode(data, Preprocessing(shape=(1, 1, 2), alpha=alpha))
    assert pixels.ravel().tolist() == [255 if alpha == "white" else 117, 156]


@pytest.mark.parametrize("alpha", ["drop", "white"])
def test_a_transparent_colour_of_16_bits(alpha: Any) -> None:
    data = _png([[[30000, 1, 2], [40000, 3, 4]]], RGB, (b"tRNS", struct.pack(">HHH", 30000, 1, 2)))
    pixels = decode(data, Preprocessing(shape=(3, 1, 2), alpha=alpha))
    assert pixels[:, 0, 0].tolist() == ([255] * 3 if alpha == "white" else [117, 0, 0])
    assert pixels[:, 0, 1].tolist() == [156, 0, 0]


def test_a_large_scan_is_scaled_in_bands() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (600, 7)).astype(np.uint16)
    pixels = decode(Image.fromarray(wide), Preprocessing(shape=(1, 600, 7)))
    np.testing.assert_array_equal(pixels[0], np.round(wide / 257))


@pytest.mark.parametrize("value", ["black", (1.0, "x")])
def test_a_declared_range_that_is_not_numeric_is_a_bad_image(value: Any) -> None:
    image = Image.open(io.BytesIO(_tiff([0.0, 1.0], np.float32, t340=0.0, t341=1.0)))
    image.load()
    image.tag_v2._tags_v2[HIGHEST] = value  # type: ignore[attr-defined]
    with pytest.raises(BadImage, match=str(HIGHEST)):
        decode(image, Preprocessing(shape=(1, 1, 2)))
