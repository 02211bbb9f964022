"""Malicious sources are refused before they fill memory or start another program."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamerge.sources import BadImage, native_shape, open_source
from storage_schemas import SourceError
from tests.support.refusals import refused


def _npy_header(shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return stream.getvalue()


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def _tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_postscript_is_refused() -> None:
    """Pillow would start Ghostscript."""
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n" + b"0" * 200
    with pytest.raises(BadImage, match=str(len(data))):
        native_shape(data)


def test_an_archive_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("images.npy", "w") as f,
    ):
        f.write(_npy_header((300, 1024, 1024)))
        for _ in range(300):
            f.write(bytes(2**20))
    with refused(SourceError, None, tmp_path / "x.npz", len(_npy_header((300, 1024, 1024))) + 300 * 2**20):
        open_source(str(tmp_path / "x.npz"))


def test_an_archive_that_declares_terabytes(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", _npy_header((10**9, 100, 100)))
    with refused(SourceError, None, tmp_path / "x.npz", " .npz "):
        open_source(str(tmp_path / "x.npz"))


def test_an_npy_file_with_the_suffix_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "x.npz").open("wb") as file:
        np.save(file, np.zeros((2, 4, 4), np.uint8))
    with refused(SourceError, None, tmp_path / "x.npz", " .npz "):
        open_source(str(tmp_path / "x.npz"))


def test_a_gzip_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "x-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x03" + struct.pack(">III", 300, 1024, 1024))
        for _ in range(300):
            file.write(bytes(2**20))
    with refused(SourceError, None, tmp_path / "x-images-idx3-ubyte.gz", 2**28 + 1):
        open_source(str(tmp_path / "x-images-idx3-ubyte.gz"))


def test_negative_sizes(tmp_path: Path) -> None:
    (tmp_path / "x-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + struct.pack(">iii", -1, -1, 4) + b"1234")
    with refused(SourceError, None, tmp_path / "x-images-idx3-ubyte", " IDX ", 20):
        open_source(str(tmp_path / "x-images-idx3-ubyte"))


@pytest.mark.parametrize("text", [b'{"l":' + b"[" * 100_000, b"9" * 5000])
def test_invalid_json_beside_an_image_is_refused(tmp_path: Path, text: bytes) -> None:
    with refused(SourceError, None, "t.tar#a", "'l'"):
        open_source(_tar(tmp_path / "t.tar", {"a.png": _png(), "a.json": text}), label_column="l")


def test_a_label_of_thousands_of_digits(tmp_path: Path) -> None:
    with refused(SourceError, None, "t.tar#a", 2**31 - 1):
        open_source(_tar(tmp_path / "t.tar", {"a.png": _png(), "a.cls": b"9" * 5000}))


def test_a_sparse_label_that_claims_gigabytes(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.cls")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:398], header[398:410] = b"%011o\0" % 0, b"%011o\0" % 512
    header[483:495] = b"%011o\0" % (6 * 10**9)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "t.tar").write_bytes(bytes(header) + b"1" * 512 + bytes(1024))
    with refused(SourceError, None, tmp_path / "t.tar", "'a.cls'", "--sparse"):
        open_source(str(tmp_path / "t.tar"))


@pytest.mark.parametrize("earlier", [b"[" * 50_000, b"[1]", b'{"x.png": 5}', b"{"])
def test_an_invalid_earlier_listing_is_refused(tmp_path: Path, earlier: bytes) -> None:
    source = open_source(_tar(tmp_path / "t.tar", {"a.png": _png()}))
    with refused(SourceError, None, "source.json.gz"):
        source.changes(gzip.compress(earlier))
