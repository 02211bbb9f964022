"""Images in columns of every type, from Parquet and Arrow files; paths beside the table; nulls."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamerge.sources import BadImage, open_source
from storage_schemas import SourceError
from tests.support.refusals import refused

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 5, 4, 3), np.uint8)


def _png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(stream, "PNG")
    return stream.getvalue()


IMAGES = [_png(number) for number in range(3)]
WIDTH = max(map(len, IMAGES))
STRUCT = [{"bytes": data, "path": None} for data in IMAGES]
BYTES = pa.list_(pa.uint8())
ROWS = pa.list_(pa.list_(pa.list_(pa.uint8())))
COLUMNS: dict[str, pa.Array] = {
    "binary": pa.array(IMAGES),
    "large": pa.array(IMAGES, pa.large_binary()),
    "view": pa.array(IMAGES, pa.binary_view()),
    "dictionary": pa.array(IMAGES).dictionary_encode(),
    "fixed size": pa.array([data.ljust(WIDTH, b"\0") for data in IMAGES], pa.binary(WIDTH)),
    "list of bytes": pa.array([list(data) for data in IMAGES], BYTES),
    "large list": pa.array([list(data) for data in IMAGES], pa.large_list(pa.uint8())),
    "struct": pa.array(STRUCT),
    "struct of large": pa.array(STRUCT, pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])),
    "struct of views": pa.array(STRUCT, pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())])),
    "pixels": pa.array(PIXELS.tolist(), ROWS),
    "channels first": pa.array(PIXELS.transpose(0, 3, 1, 2).tolist(), ROWS),
    "fixed-size lists": pa.array(PIXELS.reshape(3, 5, 12).tolist(), pa.list_(pa.list_(pa.uint8(), 12), 5)),
}
ONLY_ARROW = {"view", "struct of views"}  # Parquet has no views


def _write(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("column", COLUMNS)
def test_image_columns_of_every_type_are_read(tmp_path: Path, column: str, name: str) -> None:
    _write(tmp_path / name, pa.table({"image": COLUMNS[column], "caption": ["a", "b", "c"], "label": [4, 5, 6]}))
    source = open_source(tmp_path)
    assert [sample.label for sample in source.samples] == [4, 5, 6]
    for sample, pixels in zip(source.samples, PIXELS, strict=True):
        raw = source.reader.read(sample)
        with Image.open(io.BytesIO(raw)) if isinstance(raw, bytes) else raw as image:
            expected = pixels.reshape(5, 12) if column == "fixed-size lists" else pixels
            np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_column_of_digests_is_not_taken_for_images(tmp_path: Path, name: str) -> None:
    digests = pa.array([b"0123456789abcdef"] * 3, pa.binary(16))
    _write(tmp_path / name, pa.table({"md5": digests, "histogram": COLUMNS["list of bytes"], "image": IMAGES}))
    source = open_source(tmp_path)
    assert source.reader.read(source.samples[0]) == IMAGES[0]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
def test_a_null_is_one_bad_image(tmp_path: Path, name: str) -> None:
    for images in (pa.array([IMAGES[0], None, IMAGES[2]]), pa.array([STRUCT[0], None, STRUCT[2]])):
        _write(tmp_path / name, pa.table({"image": images}))
        source = open_source(tmp_path)
        assert len(source.samples) == 3
        assert [source.reader.read(source.samples[index]) for index in (0, 2)] == [IMAGES[0], IMAGES[2]]
        with pytest.raises(BadImage, match="row 1 of"):
            source.reader.read(source.samples[1])


Paths = Callable[[list[str]], pa.Array]
PATHS: dict[str, Paths] = {
    "bytes that are null": lambda paths: pa.array(
        [{"bytes": None, "path": path} for path in paths], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    ),
    "no bytes": lambda paths: pa.array([{"path": path} for path in paths]),
    "bytes of no type": lambda paths: pa.array([{"bytes": None, "path": path} for path in paths]),
}


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("kind", PATHS)
def test_paths_beside_the_table_are_read(tmp_path: Path, kind: str, name: str) -> None:
    (tmp_path / "images").mkdir()
    for number, data in enumerate(IMAGES):
        (tmp_path / f"images/{number}.png").write_bytes(data)
    _write(tmp_path / name, pa.table({"image": PATHS[kind]([f"images/{number}.png" for number in range(3)])}))
    source = open_source(tmp_path / name)
    assert [source.reader.read(sample) for sample in source.samples] == IMAGES
    (tmp_path / "images/1.png").write_bytes(IMAGES[0])
    assert open_source(tmp_path / name).fingerprint != source.fingerprint
    (tmp_path / "images/1.png").unlink()
    with pytest.raises(BadImage, match=r"images/1\.png"):
        source.reader.read(source.samples[1])
    assert len(open_source(tmp_path / name).samples) == 3


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow"])
@pytest.mark.parametrize("path", ["missing.png", "/etc/passwd", "../x.png", "s3://bucket/x.png", ""])
@pytest.mark.parametrize("kind", PATHS)
def test_paths_that_lead_elsewhere_are_refused(tmp_path: Path, kind: str, path: str, name: str) -> None:
    (tmp_path / "x.png").write_bytes(IMAGES[0])
    (tmp_path / "t").mkdir()
    _write(tmp_path / "t" / name, pa.table({"image": PATHS[kind]([path] * 3)}))
    with refused(SourceError, None, tmp_path / "t" / name, repr(path)):
        open_source(tmp_path / "t")


@pytest.mark.parametrize(
    ("column", "fact"),
    [
        (pa.array([[STRUCT[0]], [STRUCT[1]], [STRUCT[2]]]), "one image a row"),
        (pa.array(["a.png", "b.png", "c.png"]), "string"),
        (pa.array([[0.5] * 3] * 3), "list"),
        (pa.array([1, 2, 3]), "int64"),
    ],
)
@pytest.mark.parametrize("image_column", [None, "picture"])
def test_columns_without_images_are_refused(tmp_path: Path, column: Any, fact: str, image_column: str | None) -> None:
    pq.write_table(pa.table({"picture": column}), tmp_path / "x.parquet")
    facts = [tmp_path / "x.parquet", "picture", *([fact] if image_column else [])]
    with refused(SourceError, None, *facts):
        open_source(tmp_path, image_column=image_column)


def test_ragged_lists_and_lists_with_nulls_are_bad_images(tmp_path: Path) -> None:
    rows = [[[1, 2], [3]], [[1, 2], [3, 4]], [[1, None], [3, 4]]]
    pq.write_table(pa.table({"image": pa.array(rows, pa.list_(BYTES))}), tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert source.reader.read(source.samples[1]).size == (2, 2)  # type: ignore[union-attr]
    for index in (0, 2):
        with pytest.raises(BadImage, match=f"row {index} of"):
            source.reader.read(source.samples[index])
