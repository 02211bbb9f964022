"""Files that are not what they are called, or lie about themselves: refused in one line."""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, features

from sources import BadImage, decode, open_source
from sources.sample import make_keys
from storage_schemas import DatamergeError, SourceError


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def _header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with the 12 bytes of `size` as they are."""
    block = bytearray(
        struct.pack("100s8s8s8s12s12s8s1s100s", name, *[b"0000644"] * 3, size, b"0", b" " * 8, kind, b"")
    )
    block += b"ustar\x0000".ljust(512 - len(block), b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _bad_tar(path: Path, kind: str) -> None:
    image = _header(b"a.png", b"%011o" % len(_png())) + _png().ljust(-(-len(_png()) // 512) * 512, b"\0")
    negative = b"\xff" * 10 + struct.pack(">h", -512)
    pax = b"21 GNU.sparse.size=x\n"
    bodies = {
        "negative": image + _header(b"b.txt", negative),
        "beyond": image + _header(b"b.png", b"%011o" % 10**6),
        "pax": _header(b"x", b"%011o" % len(pax), b"x") + pax.ljust(512, b"\0") + image,
    }
    path.write_bytes(bodies[kind] + bytes(1024))


@pytest.mark.parametrize("kind", ["negative", "beyond", "pax"])
def test_a_tar_whose_headers_lie(tmp_path: Path, kind: str) -> None:
    """With a negative size the list would go round for ever."""
    _bad_tar(tmp_path / "x.tar", kind)
    with pytest.raises(SourceError, match=r"x\.tar: expected an uncompressed tar"):
        open_source(str(tmp_path / "x.tar"))


def test_a_name_in_a_tar_that_is_no_text(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("ÿ.png", "þ.png"):
            info = tarfile.TarInfo(name)
            info.size = len(_png())
            tar.addfile(info, io.BytesIO(_png()))
    source = open_source(str(tmp_path / "x.tar"))
    assert [sample.name.rpartition(" ")[2].encode() for sample in source.samples] == [rb"\xff", rb"\xfe"]
    assert [source.reader.read(sample) for sample in source.samples] == [_png(), _png()]


def test_a_name_of_a_file_that_is_no_text() -> None:
    with pytest.raises(SourceError, match=r"expected file names in UTF-8, found 'a/\\udcff\.png'; rename it"):
        make_keys(["a/ok.png", os.fsdecode(b"a/\xff.png")])


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.npz", "x-images-idx3-ubyte", "x.png"])
def test_a_pipe_is_no_source(tmp_path: Path, name: str) -> None:
    """Opening one waits for somebody who writes to it."""
    os.mkfifo(tmp_path / name)
    for where in (tmp_path, tmp_path / name):
        with pytest.raises(DatamergeError):
            open_source(str(where))


def _parquet(path: Path, **columns: list[object]) -> None:
    pq.write_table(pa.table({"image": [_png(), _png()], **columns}), path)


@pytest.mark.parametrize("position", range(20, 400, 20))
def test_a_parquet_file_with_wrong_bytes(tmp_path: Path, position: int) -> None:
    """Whatever pyarrow raises: a source is refused, or a row is."""
    _parquet(tmp_path / "x.parquet", label=[1, 2])
    data = bytearray((tmp_path / "x.parquet").read_bytes())
    data[-position : -position + 4] = b"\x81\x04\xff\x15"
    (tmp_path / "x.parquet").write_bytes(data)
    try:
        source = open_source(str(tmp_path / "x.parquet"))
    except SourceError as error:
        assert "x.parquet" in str(error)
        return
    for sample in source.samples:
        try:
            source.reader.read(sample)
        except OSError as error:
            assert "x.parquet" in str(error)


def test_a_parquet_file_that_claims_more_rows_than_it_has_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": pa.nulls(10**6, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=r"\d+ bytes that claim 1000000 rows"):
        open_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("header", [b"{'descr': '''", b"{'descr': {[]: 1}, 'fortran_order': False, 'shape': ()}"])
def test_an_npz_with_a_header_that_is_no_literal(tmp_path: Path, header: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
    with pytest.raises(SourceError, match=r"expected an \.npz archive"):
        open_source(str(tmp_path / "x.npz"))


def test_broken_deflate_within_a_sound_gzip_header(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(bytes(range(256)) * 20))
    data[12:40] = b"\xff" * 28
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(SourceError, match="broken gzip"):
        open_source(str(tmp_path / "x-images-idx3-ubyte.gz"))


def test_an_earlier_listing_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    bomb = gzip.compress(bytes(300 * 2**20), compresslevel=1)
    with pytest.raises(SourceError, match="decompression bomb"):
        open_source(str(tmp_path)).changes(bomb)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("position", [60, 150, 250])
def test_a_broken_avif_is_one_bad_image(position: int) -> None:
    """Its decoder raises RuntimeError, which would end a merge."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(stream, "AVIF")
    data = bytearray(stream.getvalue())
    data[position : position + 40] = b"\xff" * 40
    with pytest.raises(BadImage):
        decode(bytes(data), (3, 8, 8))


def test_greys_of_16_bits_are_scaled_to_the_nearest_of_8() -> None:
    """All of them, as float64 says, in a fraction of its memory."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    stream = io.BytesIO()
    Image.fromarray(every).save(stream, "PNG")
    found = decode(stream.getvalue(), (1, 256, 256))
    assert np.array_equal(found[0], (every / 257.0).round().astype(np.uint8))
    large = Image.fromarray(np.zeros((4096, 4096), np.uint16))
    tracemalloc.start()
    decode(large, (1, 4096, 4096))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4096**2  # float64 takes 16 bytes a pixel and more
