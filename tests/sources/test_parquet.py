"""Parquet files as Hugging Face datasets write them, and simpler ones."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamerge.sources import BadImage, open_source
from datamerge.sources.parquet import ParquetReader
from storage_schemas import SourceError
from tests.support.refusals import refused


def _bytes(number: int) -> bytes:
    return f"image {number}".encode()


def _hugging_face(path: Path, numbers: range, names: list[str] | None = None, **writing: Any) -> None:
    """{bytes, path} structs, integer labels, class names in the schema's metadata."""
    image = pa.array([{"bytes": _bytes(n), "path": f"{n}.png"} for n in numbers])
    table = pa.table({"image": image, "label": pa.array([n % 3 for n in numbers], pa.int64())})
    if names is not None:
        feature = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(feature)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **writing)


def test_hugging_face_images(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "train.parquet", range(5), ["cat", "dog", "ant"])
    source = open_source(tmp_path / "train.parquet")
    assert source.kind == "parquet"
    assert [sample.key for sample in source.samples] == [f"train-{row:08d}" for row in range(5)]
    assert [sample.label for sample in source.samples] == [0, 1, 2, 0, 1]
    assert list(source.class_names) == ["cat", "dog", "ant"]
    assert [source.reader.read(sample) for sample in source.samples] == [_bytes(n) for n in range(5)]


def test_several_files_and_row_groups_in_any_order(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "a" / "0.parquet", range(10), row_group_size=3)
    _hugging_face(tmp_path / "b" / "0.parquet", range(10, 14), row_group_size=2)
    (tmp_path / "README.md").write_text("a card")
    source = open_source(tmp_path)
    assert len({sample.key for sample in source.samples}) == 14
    reader = pickle.loads(pickle.dumps(source.reader))
    for number in (13, 0, 9, 3, 2, 10, 12, 5, 6, 1, 4, 7, 8, 11):
        assert reader.read(source.samples[number]) == _bytes(number)
    pickle.dumps(reader)


def test_a_row_group_is_read_once_for_consecutive_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hugging_face(tmp_path / "x.parquet", range(12), row_group_size=4)
    source = open_source(tmp_path)
    calls: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, group: int, **options: Any) -> Any:
        calls.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    for sample in source.samples:
        source.reader.read(sample)
    assert calls == [0, 1, 2]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_plain_binary_columns(tmp_path: Path, kind: pa.DataType) -> None:
    """Polars and recent pandas write large_binary."""
    table = pa.table({"jpeg": pa.array([_bytes(0), _bytes(1)], kind), "width": [1, 2]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert [source.reader.read(sample) for sample in source.samples] == [_bytes(0), _bytes(1)]
    assert [sample.label for sample in source.samples] == [None, None]


@pytest.mark.parametrize("column", ["label", "labels", "fine_label"])
def test_usual_names_of_label_columns(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({"image": [b"x", b"y"], column: [4, 2]}), tmp_path / "x.parquet")
    assert [sample.label for sample in open_source(tmp_path).samples] == [4, 2]


@pytest.mark.parametrize("dictionary", [False, True])
def test_text_labels_are_numbered_alphabetically_over_all_files(tmp_path: Path, dictionary: bool) -> None:
    for name, labels in (("a", ["dog", None]), ("b", ["cat", "dog"])):
        column = pa.array(labels)
        column = column.dictionary_encode() if dictionary else column
        pq.write_table(pa.table({"image": [b"x", b"y"], "label": column}), tmp_path / f"{name}.parquet")
    source = open_source(tmp_path)
    assert list(source.class_names) == ["cat", "dog"]
    assert [sample.label for sample in source.samples] == [1, None, 0, 1]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    table = pa.table({"image": [b"i"], "mask": [b"m"], "label": [1], "style": [2]})
    pq.write_table(table, tmp_path / "x.parquet")
    with refused(SourceError, None, ["image", "mask"], "`image_column`"):
        open_source(tmp_path)
    source = open_source(tmp_path, image_column="mask", label_column="style")
    assert source.reader.read(source.samples[0]) == b"m"
    assert source.samples[0].label == 2


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"image_column": "picture"}, ("'picture'", ["image"])),
        ({"image_column": "label"}, ("'label'", ["image"])),
        ({"label_column": "class"}, ("'class'", ["image", "label"])),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, options: dict[str, Any], facts: tuple[object, ...]) -> None:
    _hugging_face(tmp_path / "x.parquet", range(2))
    with refused(SourceError, None, tmp_path / "x.parquet", *facts):
        open_source(tmp_path, **options)


def test_a_table_without_an_image_column_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["http://x"], "label": [1]}), tmp_path / "x.parquet")
    with refused(SourceError, None, tmp_path / "x.parquet", "url string", "label int64"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("labels", "kind"), [([[1, 2], [3]], [1, 2]), ([0.5, 1.0], "number 0.5"), ([{"x": 1}, {"x": 2}], "struct")]
)
def test_labels_that_are_not_class_indices_are_refused_when_chosen(
    tmp_path: Path, labels: list[Any], kind: object
) -> None:
    """Truncating 0.5 to class 0 would be silent; a list has no int()."""
    pq.write_table(pa.table({"image": [b"x", b"y"], "label": pa.array(labels)}), tmp_path / "x.parquet")
    with refused(SourceError, None, tmp_path / "x.parquet", "'label'", kind):
        open_source(tmp_path, label_column="label")


@pytest.mark.parametrize("data", [b"", b"PAR1 not really", b"text"])
def test_a_file_that_is_not_parquet(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.parquet").write_bytes(data)
    with refused(SourceError, None, tmp_path / "x.parquet", " Parquet "):
        open_source(tmp_path)


def test_empty_tables(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "x.parquet", range(0))
    with refused(SourceError, None, tmp_path / "x.parquet", "image null", "label int64"):
        open_source(tmp_path)
    image = pa.array([], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
    with refused(SourceError, None, tmp_path / "x.parquet", "a file without rows"):
        open_source(tmp_path)
    pq.write_table(pa.table({"image": image}), tmp_path / "y.parquet")
    with refused(SourceError, None, tmp_path, "2 files, such as x.parquet, without rows"):
        open_source(tmp_path)


def test_rows_without_bytes_are_bad_images(tmp_path: Path) -> None:
    """A path on another machine, or null: the sample is rejected and the merge continues."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image = pa.array([{"bytes": b"ok", "path": None}, {"bytes": None, "path": "/home/x.png"}, None], kind)
    pq.write_table(pa.table({"image": image}), tmp_path / "x.parquet")
    source = open_source(tmp_path)
    assert source.reader.read(source.samples[0]) == b"ok"
    for row in (1, 2):
        with pytest.raises(BadImage, match=rf"row {row} of x\.parquet"):
            source.reader.read(source.samples[row])


def test_a_missing_row_is_a_bad_image(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "x.parquet", range(2))
    source = open_source(tmp_path)
    _hugging_face(tmp_path / "x.parquet", range(1))
    assert isinstance(source.reader, ParquetReader)
    with pytest.raises(BadImage, match="no row 1"):
        source.reader.read(source.samples[1])


def test_fingerprints_depend_on_rows_and_names_but_not_on_limits(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "one" / "x.parquet", range(6))
    whole, part = open_source(tmp_path / "one"), open_source(tmp_path / "one", limit_first=2)
    assert list(part.samples) == list(whole.samples)[:2]
    assert part.fingerprint == whole.fingerprint
    _hugging_face(tmp_path / "two" / "x.parquet", range(7))
    _hugging_face(tmp_path / "three" / "y.parquet", range(6))
    prints = {open_source(tmp_path / name).fingerprint for name in ("one", "two", "three")}
    assert len(prints) == 3


def test_files_are_read_through_fsspec(tmp_path: Path) -> None:
    _hugging_face(tmp_path / "x.parquet", range(3))
    files = fsspec.filesystem("memory")
    files.pipe("/parquet-test/x.parquet", (tmp_path / "x.parquet").read_bytes())
    try:
        for url in ("memory://parquet-test", "memory://parquet-test/x.parquet"):
            source = open_source(url)
            assert [source.reader.read(sample) for sample in source.samples] == [_bytes(n) for n in range(3)]
    finally:
        files.rm("/parquet-test", recursive=True)


def test_a_file_with_a_relative_path_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _hugging_face(tmp_path / "x.parquet", range(2))
    monkeypatch.chdir(tmp_path)
    source = open_source("x.parquet")
    assert source.reader.read(source.samples[1]) == _bytes(1)


def test_a_column_of_lists_of_labels_is_not_chosen_by_default(tmp_path: Path) -> None:
    """Detection data sets have lists of labels; their images can still be merged."""
    pq.write_table(pa.table({"image": [b"x"], "labels": [[1, 2]], "fine_label": [3]}), tmp_path / "x.parquet")
    assert open_source(tmp_path).samples[0].label == 3
    pq.write_table(pa.table({"image": [b"x"], "labels": [[1, 2]]}), tmp_path / "x.parquet")
    assert open_source(tmp_path).samples[0].label is None


@pytest.mark.parametrize("kind", [pa.int8(), pa.float32(), pa.bool_()], ids=str)
def test_one_column_a_class_is_read_as_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: pa.DataType
) -> None:
    def write(name: str, *rows: tuple[int, int, int]) -> None:
        columns = {name: pa.array([row[place] for row in rows]).cast(kind) for place, name in enumerate("zab")}
        table = {"image": [_bytes(n) for n in range(len(rows))], "age": [7] * len(rows), **columns}
        pq.write_table(pa.table(table), tmp_path / name)

    write("0.parquet", (0, 1, 0), (0, 0, 1))
    write("1.parquet", (1, 0, 0), (1, 0, 0))
    source = open_source(tmp_path)
    assert [sample.label for sample in source.samples] == [1, 2, 0, 0]
    assert (source.class_names, source.unlabelled) == (["z", "a", "b"], "")
    assert "z, a, b hold one 1 a row, taken as 3 classes" in capsys.readouterr().err
    assert [sample.label for sample in open_source(tmp_path, label_column="a").samples] == [1, 0, 0, 0]
    assert "'a' is one of 3 columns of 0 and 1" in capsys.readouterr().err
    for name in ("1.parquet", "0.parquet"):
        write(name, (0, 1, 0), (1, 0, 1))
        source = open_source(tmp_path)
        assert ({sample.label for sample in source.samples}, source.class_names) == ({None}, [])
        assert "z, a, b hold 0 and 1, but not one 1 each in 1 of 2 rows, first row 1" in source.unlabelled
        assert ("columns age is called label" in source.unlabelled) == (name == "0.parquet")
        assert source.unlabelled in capsys.readouterr().err
