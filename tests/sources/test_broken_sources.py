"""Files with wrong names, or with headers that contradict their contents, are refused in one line."""

from __future__ import annotations

import gzip
import io
import json
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

from datamerge.sources import BadImage, decode, open_source
from storage_schemas import SourceError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def _header(name: bytes, size: bytes, kind: bytes = b"0") -> bytes:
    """A ustar header with these raw bytes as its size field."""
    block = bytearray(
        struct.pack("100s8s8s8s12s12s8s1s100s", name, *[b"0000644"] * 3, size, b"0", b" " * 8, kind, b"")
    )
    block += b"ustar\x0000".ljust(512 - len(block), b"\0")
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def _image(name: bytes) -> bytes:
    return _header(name, b"%011o" % len(_png())) + _png().ljust(-(-len(_png()) // 512) * 512, b"\0")


def _extension(text: bytes, kind: bytes = b"x") -> bytes:
    return _header(b"x", b"%011o" % len(text), kind) + text.ljust(-(-len(text) // 512) * 512, b"\0")


BAD_TARS = {
    "negative": _image(b"a.png") + _header(b"b.txt", b"\xff" * 10 + struct.pack(">h", -512)),
    "before the file": _image(b"a.png") + _header(b"b.png", b"\xff" * 10 + struct.pack(">h", -10240), b"S"),
    "beyond": _image(b"a.png") + _header(b"b.png", b"%011o" % 10**6),
    "text beyond": _image(b"a.png") + _header(b"a.cls", b"%011o" % 10**6),
    "endless": _image(b"a.png") + _header(b"b.txt", b"\x80" + struct.pack(">3xq", 2**62)),
    "no number": _extension(b"21 GNU.sparse.size=x\n") + _image(b"a.png"),
    "negative image": _extension(b"11 size=-9\n") + _image(b"a.png"),
    "image of gigabytes": _extension(b"19 size=6000000000\n", b"g") + _image(b"a.png"),
    "sparse": _image(b"a.png") + _header(b"b.png", b"%011o" % 0, b"S"),
    "nested": _extension(b"6 a=b\n") * 1500 + _image(b"a.png"),
}

# Facts in the message; for the other tars, the message quotes tarfile.
SHOWN: dict[str, tuple[object, ...]] = {
    "negative": ("'b.txt'", -512),
    "before the file": ("'b.png'",),
    "endless": ("'b.txt'", 2**62),
    "negative image": ("'a.png'", -9),
    "image of gigabytes": ("'a.png'", 6 * 10**9),
    "sparse": ("'b.png'", "--sparse"),
}


@pytest.mark.parametrize("kind", BAD_TARS)
def test_tars_with_false_headers_are_refused(tmp_path: Path, kind: str) -> None:
    """A negative size would make tarfile list the same members for ever."""
    (tmp_path / "x.tar").write_bytes(BAD_TARS[kind] + bytes(1024))
    with refused(SourceError, None, tmp_path / "x.tar", " tar: ", *SHOWN.get(kind, ())) as caught:
        open_source(str(tmp_path / "x.tar"))
    assert not str(caught.value).endswith(": ")


def test_a_sparse_member_that_is_not_an_image_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(_image(b"a.png") + _header(b"a.bin", b"%011o" % 0, b"S") + bytes(1024))
    assert len(open_source(str(tmp_path / "x.tar")).samples) == 1


def test_a_global_header_is_not_copied_for_every_member(tmp_path: Path) -> None:
    keys = _extension(b"".join(b"10 %05d=\n" % number for number in range(20_000)), b"g")
    (tmp_path / "x.tar").write_bytes(keys + b"".join(_image(b"%d.png" % n) for n in range(200)) + bytes(1024))
    tracemalloc.start()
    open_source(str(tmp_path / "x.tar"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25  # 200 copies take 200 MB


def test_names_in_tars_that_are_not_utf_8_are_escaped(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name in ("ÿ.png", "þ.png"):
            info = tarfile.TarInfo(name)
            info.size = len(_png())
            tar.addfile(info, io.BytesIO(_png()))
    source = open_source(str(tmp_path / "x.tar"))
    assert [sample.name.rpartition(" ")[2].encode() for sample in source.samples] == [rb"\xff", rb"\xfe"]
    assert [source.reader.read(sample) for sample in source.samples] == [_png(), _png()]


@pytest.mark.parametrize("ending", ["png", "tar", "parquet", "npz"])
def test_file_names_that_are_not_utf_8_are_refused(tmp_path: Path, ending: str) -> None:
    name = os.fsdecode(b"\xff") + f".{ending}"
    (tmp_path / name).write_bytes(_image(b"a.png"))
    where = tmp_path / name if ending == "npz" else tmp_path
    with refused(SourceError, None, tmp_path, "UTF-8", rf"'\udcff.{ending}'"):
        open_source(str(where), label_column="l")


def test_class_names_that_utf_8_cannot_encode_are_escaped(tmp_path: Path) -> None:
    """A lone surrogate could not be written to a manifest."""
    json_ = b'{"l": "\\ud800"}'
    (tmp_path / "x.tar").write_bytes(
        _image(b"a.png") + _header(b"a.json", b"%011o" % len(json_)) + json_.ljust(512, b"\0") + bytes(1024)
    )
    assert open_source(str(tmp_path / "x.tar"), label_column="l").class_names == [r"\ud800"]
    feature = {"info": {"features": {"label": {"names": ["\ud800", "b"]}}}}
    table = pa.table({"image": [_png()], "label": [0]})
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), tmp_path / "x.parquet")
    assert open_source(str(tmp_path / "x.parquet")).class_names == [r"\ud800", "b"]


@pytest.mark.parametrize("name", ["x.tar", "x.parquet", "x.npz", "x-images-idx3-ubyte", "x.png"])
def test_named_pipes_are_refused(tmp_path: Path, name: str) -> None:
    """Opening one would wait for a writer."""
    os.mkfifo(tmp_path / name)
    for where in (tmp_path, tmp_path / name):
        with refused(SourceError, None, tmp_path):
            open_source(str(where))


def _parquet(path: Path, **columns: list[object]) -> None:
    pq.write_table(pa.table({"image": [_png(), _png()], **columns}), path)


@pytest.mark.parametrize("position", range(20, 400, 20))
def test_damage_to_a_parquet_file_refuses_the_source_or_rows(tmp_path: Path, position: int) -> None:
    """Whatever pyarrow raises becomes an error that names the file."""
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
        except (BadImage, OSError) as error:
            assert "x.parquet" in str(error)


def test_a_parquet_file_that_claims_more_rows_than_it_has_bytes(tmp_path: Path) -> None:
    table = pa.table({"image": pa.nulls(10**6, pa.binary())})
    pq.write_table(table, tmp_path / "x.parquet")
    size = (tmp_path / "x.parquet").stat().st_size
    with refused(SourceError, None, tmp_path / "x.parquet", size, 10**6):
        open_source(str(tmp_path / "x.parquet"))


def test_a_parquet_file_whose_row_counts_disagree_is_refused(tmp_path: Path) -> None:
    """Each field of value 2 (a zigzag varint of 64 bits) becomes 50 in turn; one of them is the number of rows."""
    _parquet(tmp_path / "x.parquet")
    data = (tmp_path / "x.parquet").read_bytes()
    messages = []
    for place in range(len(data) - 8):
        if data[place : place + 2] == b"\x16\x04":
            (tmp_path / "x.parquet").write_bytes(data[: place + 1] + b"\x64" + data[place + 2 :])
            try:
                open_source(str(tmp_path / "x.parquet"))
            except SourceError as error:
                messages.append(str(error).rpartition(": ")[2])
    assert any({"50", "2"} <= set(message.split()) for message in messages)


def test_a_parquet_file_with_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([_png()]), pa.array([1]), pa.array([2])], ["image", "label", "label"])
    pq.write_table(table, tmp_path / "x.parquet")
    with refused(SourceError, None, tmp_path / "x.parquet", " Parquet "):
        open_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '''",
        b"{'descr': {[]: 1}, 'fortran_order': False, 'shape': ()}",
        b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}" % 10**30,
        b"{'descr': ',', 'fortran_order': False, 'shape': (2, 4, 4)}",
        b"if x:\n    1\n  2",
    ],
)
def test_an_npz_with_an_invalid_header_is_refused(tmp_path: Path, header: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n")
    with refused(SourceError, None, tmp_path / "x.npz", " .npz "):
        open_source(str(tmp_path / "x.npz"))


def test_members_of_an_npz_that_are_not_arrays_are_left_out(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.save(stream, np.zeros((2, 4, 4), np.uint8))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", stream.getvalue())
        archive.writestr("labels", b"text")
    assert [sample.label for sample in open_source(str(tmp_path / "x.npz")).samples] == [None, None]


def test_the_total_size_of_the_members_of_an_npz_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "x.npz", *[np.zeros((9, 100, 100), np.uint8)] * 5)
    monkeypatch.setattr("datamerge.sources.unpack.MAX_UNPACKED", 10**5)
    with refused(SourceError, None, tmp_path / "x.npz", 5 * (128 + 9 * 100 * 100)):
        open_source(str(tmp_path / "x.npz"))


def test_broken_deflate_data_after_a_valid_gzip_header_are_refused(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(bytes(range(256)) * 20))
    data[12:40] = b"\xff" * 28
    (tmp_path / "x-images-idx3-ubyte.gz").write_bytes(data)
    with refused(SourceError, None, tmp_path / "x-images-idx3-ubyte.gz", "gzip:"):
        open_source(str(tmp_path / "x-images-idx3-ubyte.gz"))


def test_an_earlier_listing_that_unpacks_to_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(_png())
    bomb = gzip.compress(bytes(300 * 2**20), compresslevel=1)
    with refused(SourceError, None, "source.json.gz", len(bomb)):
        open_source(str(tmp_path)).changes(bomb)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
@pytest.mark.parametrize("position", [60, 150, 250])
def test_a_broken_avif_is_one_bad_image(position: int) -> None:
    """Pillow's decoder raises RuntimeError, which would otherwise end a merge."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)).save(stream, "AVIF")
    data = bytearray(stream.getvalue())
    data[position : position + 40] = b"\xff" * 40
    with pytest.raises(BadImage):
        decode(bytes(data), Preprocessing(shape=(3, 8, 8)))


def test_16_bit_greys_are_scaled_to_the_nearest_8_bit_level() -> None:
    """All 65536 levels equal those computed in float64, which takes several times the memory."""
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    stream = io.BytesIO()
    Image.fromarray(every).save(stream, "PNG")
    found = decode(stream.getvalue(), Preprocessing(shape=(1, 256, 256)))
    assert np.array_equal(found[0], (every / 257.0).round().astype(np.uint8))
    large = Image.fromarray(np.zeros((4096, 4096), np.uint16))
    tracemalloc.start()
    decode(large, Preprocessing(shape=(1, 4096, 4096)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 * 4096**2  # float64 takes 16 bytes a pixel and more


def test_a_negative_label_is_none(tmp_path: Path) -> None:
    """The other labels keep their numbers."""
    rows = {"a": 0, "b": 2, "c": 10, "d": -1}
    for name in rows:
        (tmp_path / f"{name}.png").write_bytes(_png())
    (tmp_path / "labels.csv").write_text("file,label\n" + "".join(f"{k}.png,{v}\n" for k, v in rows.items()))
    assert [sample.label for sample in open_source(str(tmp_path)).samples] == [0, 2, 10, None]
    _parquet(tmp_path / "x.parquet", label=[-1, 3])
    assert [sample.label for sample in open_source(str(tmp_path / "x.parquet")).samples] == [None, 3]


def test_the_label_column_of_a_parquet_file_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    _parquet(tmp_path / "x.parquet", fine=[1, 2], coarse=[0, 0])
    fine, coarse = (open_source(str(tmp_path / "x.parquet"), label_column=name) for name in ("fine", "coarse"))
    assert fine.fingerprint != coarse.fingerprint


def test_spaces_in_file_names_are_replaced_in_keys(tmp_path: Path) -> None:
    np.savez(tmp_path / "my images.npz", images=np.zeros((2, 4, 4), np.uint8))
    samples = open_source(str(tmp_path / "my images.npz")).samples
    assert [sample.key for sample in samples] == ["my_images-00000000", "my_images-00000001"]


def test_a_tar_that_ends_within_a_label_is_refused(tmp_path: Path) -> None:
    body = _header(b"a.cls", b"%011o" % 5000) + b"1" * 100
    (tmp_path / "x.tar").write_bytes(body)
    with refused(SourceError, None, tmp_path / "x.tar", " tar: "):
        open_source(f"{tmp_path}/x.tar")


def test_a_table_of_identical_images_is_refused_with_advice(tmp_path: Path) -> None:
    """A footer may claim any number of rows, so 20,000 in a few bytes are refused; following the advice helps."""
    table = pa.table({"image": [b"x"] * 20_000, "label": [0] * 20_000})
    pq.write_table(table, tmp_path / "x.parquet")
    with refused(SourceError, None, tmp_path / "x.parquet", 20_000, "compression=None, use_dictionary=False"):
        open_source(str(tmp_path / "x.parquet"))
    pq.write_table(table, tmp_path / "x.parquet", compression=None, use_dictionary=False)
    assert len(open_source(str(tmp_path / "x.parquet")).samples) == 20_000
