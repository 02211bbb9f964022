"""EXIF orientation is applied as the user sets, by default as the library does whose layout a source has."""

from __future__ import annotations

import io
import struct
import tarfile
import warnings
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from datamerge.runtime import fields
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import BadImage, decode, native_shape, open_source
from datamerge.sources.images import TURNED_REMARK, describe_remarks
from datamerge.sources.orientation import Exif, usual_exif
from storage_schemas.schema.preprocessing import Preprocessing

Pixels = npt.NDArray[np.uint8]

ORIENTATION = 0x0112
PIXELS = np.random.default_rng(3).integers(0, 256, (5, 8, 3), np.uint8)


def photo(orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """An image of 8 x 5 pixels with this EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, kind, exif=exif, **options)
    return stream.getvalue()


def _decoded_by_datasets(data: bytes) -> Image.Image:
    image: Image.Image = datasets.Image(mode="RGB").decode_example({"bytes": data, "path": None})
    return image


def _decoded_by_torchvision(data: bytes) -> Image.Image:
    """As `torchvision.datasets.folder.pil_loader` does, from bytes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about EXIF data that are cut
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image).transpose(2, 0, 1)


def _decoded(data: bytes | Image.Image, exif: Exif, remarks: list[str] | None = None) -> Pixels:
    shape = native_shape(data, exif)
    return decode(data, Preprocessing(shape=shape, resize="none"), exif, remarks)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_as_the_libraries_do(kind: str, orientation: int) -> None:
    """datasets.Image turns images; torchvision's loader does not, except for TIFFs, which Pillow itself turns."""
    data = photo(orientation, kind)
    np.testing.assert_array_equal(_decoded(data, "transpose"), _pixels(_decoded_by_datasets(data)))
    np.testing.assert_array_equal(_decoded(data, "ignore"), _pixels(_decoded_by_torchvision(data)))
    if kind == "TIFF":
        np.testing.assert_array_equal(_decoded(data, "ignore"), _decoded(data, "transpose"))


@pytest.mark.parametrize("exif", get_args(Exif))
@pytest.mark.parametrize("orientation", range(10))
def test_images_with_an_orientation_are_remarked_on(orientation: int, exif: Exif) -> None:
    remarks: list[str] = []
    _decoded(photo(orientation), exif, remarks)
    assert remarks == [TURNED_REMARK] * (2 <= orientation <= 8)


@pytest.mark.parametrize("exif", get_args(Exif))
def test_the_remark_is_one_line_with_the_count_and_the_other_choice(exif: Exif) -> None:
    (line,) = describe_remarks({TURNED_REMARK: 3}, 10, exif)
    (other,) = set(get_args(Exif)) - {exif}
    assert "3 of 10" in line
    assert f'`exif="{other}"`' in line
    assert describe_remarks({}, 10, exif) == []


def test_an_mpo_of_several_frames_is_turned() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    second = Image.new("RGB", (8, 5))
    Image.fromarray(PIXELS).save(
        stream, "MPO", save_all=True, append_images=[second], exif=exif, quality=100, subsampling=0
    )
    data = stream.getvalue()
    assert Image.open(io.BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(_decoded(data, "transpose"), _pixels(_decoded_by_datasets(data)))
    np.testing.assert_array_equal(_decoded(data, "ignore"), _pixels(_decoded_by_torchvision(data)))


def test_an_orientation_in_xmp_is_applied_as_datasets_does() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "JPEG", xmp=xmp)
    assert _decoded_by_datasets(stream.getvalue()).size == (5, 8)
    np.testing.assert_array_equal(
        _decoded(stream.getvalue(), "transpose"), _pixels(_decoded_by_datasets(stream.getvalue()))
    )


@pytest.mark.parametrize("exif", get_args(Exif))
@pytest.mark.parametrize(
    "block",
    [b"", b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0" + struct.pack("<IHHHI", 8, 9, ORIENTATION, 3, 99)],
    ids=["empty", "nothing", "garbage", "cut"],
)
def test_images_with_unreadable_exif_data_are_decoded(block: bytes, exif: Exif) -> None:
    stream = io.BytesIO()
    Image.fromarray(PIXELS).save(stream, "JPEG", exif=block)
    data = stream.getvalue()
    remarks: list[str] = []
    np.testing.assert_array_equal(_decoded(data, exif, remarks), _pixels(_decoded_by_torchvision(data)))
    assert remarks == []


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_sizes_are_those_after_the_orientation_is_applied(kind: str) -> None:
    data = photo(6, kind)
    assert native_shape(data) == (3, 5, 8)
    assert native_shape(data, "transpose") == (3, 8, 5)
    for exif, size in (("ignore", (8, 5)), ("transpose", (5, 8))):
        with pytest.raises(BadImage, match="expected {1}x{0} pixels, found {0}x{1}".format(*size)):
            decode(data, Preprocessing(shape=(3, *size), resize="none"), exif)  # type: ignore[arg-type]


@pytest.mark.parametrize("exif", get_args(Exif))
def test_images_from_custom_data_sets_are_turned_too(exif: Exif) -> None:
    """Custom data sets may return images opened by Pillow; those that torchvision converted keep their EXIF data."""
    data = photo(6)
    expected = _pixels(_decoded_by_datasets(data) if exif == "transpose" else _decoded_by_torchvision(data))
    for image in (Image.open(io.BytesIO(data)), _decoded_by_torchvision(data)):
        np.testing.assert_array_equal(_decoded(image, exif), expected)
    np.testing.assert_array_equal(_decoded(_decoded_by_datasets(data), exif), _pixels(_decoded_by_datasets(data)))


def _folder(path: Path, data: bytes) -> str:
    (path / "class").mkdir(parents=True)
    (path / "class" / "x.jpg").write_bytes(data)
    return str(path)


def _tar(path: Path, data: bytes) -> str:
    with webdataset.TarWriter(f"{path}.tar") as writer:
        writer.write({"__key__": "0", "jpg": data})
    return f"{path}.tar"


def _parquet(path: Path, data: bytes) -> str:
    pq.write_table(pa.table({"image": [{"bytes": data, "path": None}]}), f"{path}.parquet")
    return f"{path}.parquet"


def _saved_to_disk(path: Path, data: bytes) -> str:
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": [{"bytes": data, "path": None}]}, features=features).save_to_disk(path)
    return str(path)


def _first_of_torchvision(url: str) -> Image.Image:
    make_torchvision_importable()
    from torchvision.datasets import ImageFolder

    image: Image.Image = ImageFolder(url)[0][0]
    return image


def _first_of_webdataset(url: str) -> Image.Image:
    with tarfile.open(url) as archive:
        member = archive.extractfile("0.jpg")
        assert member is not None
        image: Image.Image = webdataset.autodecode.imagehandler("pil")("jpg", member.read())
    return image


def _first_of_parquet(url: str) -> Image.Image:
    table = pq.read_table(url).to_pylist()
    image: Image.Image = datasets.Image().decode_example(table[0]["image"])
    return image


def _first_of_disk(url: str) -> Image.Image:
    image: Image.Image = datasets.load_from_disk(url)[0]["image"]
    return image


@pytest.mark.parametrize(
    ("write", "read"),
    [
        pytest.param(_folder, _first_of_torchvision, id="folder"),
        pytest.param(_tar, _first_of_webdataset, id="tar"),
        pytest.param(_parquet, _first_of_parquet, id="parquet"),
        pytest.param(_saved_to_disk, _first_of_disk, id="save_to_disk"),
    ],
)
def test_the_default_matches_the_library_of_the_layout(write: Any, read: Any, tmp_path: Path) -> None:
    url = write(tmp_path / "data", photo(6))
    source = open_source(url)
    pixels = _decoded(source.reader.read(source.samples[0]), usual_exif(source.kind))
    np.testing.assert_array_equal(pixels, _pixels(read(url)))


def test_the_setting_and_the_decoder_have_the_same_choices() -> None:
    """The setting is declared in `datamerge.runtime`, which does not import the decoder."""
    choices = get_args(get_args(fields.ExifSetting)[0])[0]
    assert set(get_args(choices)) == set(get_args(Exif))
