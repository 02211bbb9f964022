"""Labels mean the same in every form and every kind of source; odd labels are refused with their place."""

from __future__ import annotations

import datetime
import io
import json
import tarfile
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from datamerge.sources import open_source
from datamerge.sources.labels import OTHERS, USUAL
from storage_schemas import SourceError
from tests.support.refusals import refused


def _png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def _images(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for number in range(count):
        (folder / f"{number:02d}.png").write_bytes(_png())
    return folder


def _folders(place: Path, labels: Sequence[Any]) -> Path:
    for number, label in enumerate(labels):
        path = place / str(label) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_png())
    return place


def _csv(place: Path, labels: Sequence[Any]) -> Path:
    _images(place, len(labels))
    texts = [f'"{label}"' if "," in str(label) else "" if label is None else str(label) for label in labels]
    rows = [f"{number:02d}.png,{text}" for number, text in enumerate(texts)]
    (place / "labels.csv").write_text("\n".join(["file,label", *rows]))
    return place


def _parquet(place: Path, labels: Any) -> Path:
    column = labels if isinstance(labels, pa.Array) else pa.array(labels)
    pq.write_table(pa.table({"image": [_png()] * len(column), "label": column}), place.with_suffix(".parquet"))
    return place.with_suffix(".parquet")


def _npz(place: Path, labels: Any) -> Path:
    np.savez(place.with_suffix(".npz"), images=np.zeros((len(labels), 4, 4, 3), np.uint8), labels=np.asarray(labels))
    return place.with_suffix(".npz")


def _tar(place: Path, labels: Sequence[Any], member: str = "cls") -> Path:
    with tarfile.open(place.with_suffix(".tar"), "w") as tar:
        for number, label in enumerate(labels):
            parts = {"png": _png()}
            if label is not None:
                parts[member] = label if isinstance(label, bytes) else str(label).encode()
            for name, data in parts.items():
                info = tarfile.TarInfo(f"{number:02d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return place.with_suffix(".tar")


def _json(place: Path, labels: Sequence[Any]) -> Path:
    return _tar(place, [json.dumps({"label": label}).encode() for label in labels], "json")


class Items:
    """A custom data set."""

    labels: Sequence[Any] = ()

    def __len__(self) -> int:
        return len(Items.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        return Image.new("RGB", (4, 4)), Items.labels[index]


def _python(place: Path, labels: Any) -> str:
    Items.labels = labels
    return f"python:{__name__}:Items"


Write = Callable[[Path, Any], Path | str]
TEXT: dict[str, Write] = {"csv": _csv, "tar": _tar, "parquet": _parquet, "npz": _npz, "python": _python}
TYPED = ("parquet", "npz", "python")
NUMBERS = [8, 10, 9, 8, 0, 100]
ONE_HOT = np.eye(4, dtype=int)[[3, 0, 2, 3]]

CASES: list[tuple[str, Write, Any, Sequence[int | None]]] = [
    # Text, bytes, integers, booleans and floats, in tables, tars, arrays and custom data sets.
    *((f"text in {name}", write, [str(label) for label in NUMBERS], NUMBERS) for name, write in TEXT.items()),
    *((f"padded text in {name}", write, [f"{n:04d}" for n in NUMBERS], NUMBERS) for name, write in TEXT.items()),
    *((f"1.0 in {name}", write, [f"{label}.0" for label in NUMBERS], NUMBERS) for name, write in TEXT.items()),
    *((f"1e0 in {name}", write, [f"{label:e}" for label in NUMBERS], NUMBERS) for name, write in TEXT.items()),
    *((f"spaces in {name}", write, [f" {label} " for label in NUMBERS], NUMBERS) for name, write in TEXT.items()),
    *((f"integers in {name}", write, NUMBERS, NUMBERS) for name, write in TEXT.items()),
    *(
        (f"bytes in {name}", TEXT[name], [b"8", b"10", b"9"], [8, 10, 9])
        for name in ("parquet", "npz", "tar", "python")
    ),
    *((f"floats in {name}", TEXT[name], [0.0, 1.0, 12.0], [0, 1, 12]) for name in TYPED),
    *((f"one-hot in {name}", TEXT[name], ONE_HOT.tolist(), [3, 0, 2, 3]) for name in TYPED),
    *((f"booleans in {name}", TEXT[name], [True, False], [1, 0]) for name in TYPED),
    *((f"lists of one in {name}", TEXT[name], [[7], [11]], [7, 11]) for name in TYPED),
    *((f"hexadecimal in {name}", write, ["0x1", "0xA", "0X9"], [1, 10, 9]) for name, write in TEXT.items()),
    *(
        (f"hexadecimal and others in {name}", write, ["0x1", "11", "unknown"], [1, 11, None])
        for name, write in TEXT.items()
    ),
    *((f"missing in {name}", TEXT[name], ["3", None, "11"], [3, None, 11]) for name in ("csv", "parquet", "python")),
    *(
        (f"NaN in {name}", TEXT[name], [3.0, float("nan"), 11.0], [3, None, 11])
        for name in ("parquet", "npz", "python")
    ),
    *((f"negative in {name}", write, ["-1", "11", "2"], [None, 11, 2]) for name, write in TEXT.items()),
    *(
        (f"{odd} in {name}", write, ["8", "10", odd, "9"], [8, 10, None, 9])
        for name, write in TEXT.items()
        for odd in ("NaN", "unknown", "None", "N/A")
    ),
    # Samples follow the order of the folder names.
    *((f"{odd} among folders", _folders, ["8", "10", odd, "9"], [10, 8, 9, None]) for odd in ("NaN", "unknown")),
    ("folders", _folders, NUMBERS, sorted(NUMBERS, key=str)),
    ("padded folders", _folders, [f"{label:03d}" for label in NUMBERS], sorted(NUMBERS)),
    ("JSON numbers", _json, NUMBERS, NUMBERS),
    ("JSON text", _json, list(map(str, NUMBERS)), NUMBERS),
    ("decimals", _parquet, [Decimal("8.00"), Decimal("10.00")], [8, 10]),
    ("dictionary", _parquet, pa.array(["8", "10", "9"]).dictionary_encode(), [8, 10, 9]),
    ("large text", _parquet, pa.array(["8", "10", "9"], pa.large_string()), [8, 10, 9]),
    ("fixed lists", _parquet, pa.array([[7], [11]], pa.list_(pa.int64(), 1)), [7, 11]),
    ("one-hot floats", _npz, ONE_HOT.astype(np.float32), [3, 0, 2, 3]),
    ("columns", _npz, np.array([[7], [11]]), [7, 11]),
    ("NumPy's numbers", _python, [np.int64(7), np.uint8(11), np.array(2)], [7, 11, 2]),
]


@pytest.mark.parametrize(
    ("write", "labels", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_labels_mean_the_same_in_every_form(
    tmp_path: Path, write: Write, labels: Any, expected: list[int | None]
) -> None:
    assert [sample.label for sample in open_source(write(tmp_path / "x", labels)).samples] == expected


@pytest.mark.parametrize("write", [*TEXT.values(), _folders], ids=[*TEXT, "folders"])
def test_names_are_numbered_alphabetically(tmp_path: Path, write: Write) -> None:
    source = open_source(write(tmp_path / "x", ["dog", "cat", "eel", "cat"]))
    assert list(source.class_names) == ["cat", "dog", "eel"]
    found = [sample.label for sample in source.samples]
    assert found == ([0, 0, 1, 2] if write is _folders else [1, 0, 2, 0])


@pytest.mark.parametrize("write", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize(
    ("labels", "facts"),
    [
        (["0", "1", "2", "cat"], (3, 1, "cat")),
        (["0", "1", "0.5"], ("0.5",)),
        (["0", "1", "2,0"], ("2,0", "comma")),
        (["0", str(2**31)], (2**31 - 1, 2**31)),
        (["0", "1", "9" * 5000], (2**31 - 1,)),
    ],
    ids=["names among numbers", "a fraction", "a comma", "33 bits", "thousands of digits"],
)
def test_odd_labels_are_refused_with_their_row(
    tmp_path: Path, write: Write, labels: list[str], facts: tuple[object, ...]
) -> None:
    source = write(tmp_path / "x", labels)
    with refused(SourceError, None, *facts, "label_column") as caught:
        open_source(source)
    row = len(labels) - 1
    assert any(
        place in str(caught.value)
        for place in (f"line {row + 2}", f"row {row}", f"#{row}", f"item {row}", f"#{row:02d}")
    )


def test_numbers_and_names_among_class_folders(tmp_path: Path) -> None:
    with refused(SourceError, None, tmp_path, "3 different numbers", "1 others", "'cat'"):
        open_source(_folders(tmp_path / "few", ["0", "1", "2", "cat"]))
    source = open_source(_folders(tmp_path / "emnist", ["0", "1", "A", "B", "C"]))
    assert list(source.class_names) == ["0", "1", "A", "B", "C"]
    with refused(SourceError, None, tmp_path, "07", "7"):
        open_source(_folders(tmp_path / "twice", ["7", "07"]))


@pytest.mark.parametrize("write", TEXT.values(), ids=TEXT)
def test_samples_without_a_label_are_counted(
    tmp_path: Path, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    open_source(write(tmp_path / "x", ["8", "NaN", "10", "-1", "NaN"]))
    stderr = capsys.readouterr().err
    assert "3 of 5 samples have no label" in stderr
    assert "'NaN' in 2" in stderr
    assert "'-1' in 1" in stderr


def _columns(place: Path, **columns: Any) -> Path:
    pq.write_table(pa.table({"image": [_png()] * 3, **columns}), place / "x.parquet")
    return place / "x.parquet"


@pytest.mark.parametrize("name", [*USUAL, *OTHERS, "Label", "LABEL", "Class", "target-label"])
def test_label_columns_are_recognised_by_name(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "csv").mkdir()
    sources = [_columns(tmp_path, **{name: [4, 2, 0]})]
    if "/" not in name:
        folder = _images(tmp_path / "folder", 3)
        (folder / "labels.csv").write_text(f"id,{name},file,size\n1,4,00.png,9\n2,2,01.png,9\n3,0,02.png,9\n")
        arrays: dict[str, Any] = {"images": np.zeros((3, 4, 4), np.uint8), name: np.array([4, 2, 0])}
        np.savez(tmp_path / "x.npz", **arrays)
        sources += [folder, tmp_path / "x.npz"]
    for source in sources:
        assert [sample.label for sample in open_source(source).samples] == [4, 2, 0], source
    if name not in USUAL:
        assert f"labels are taken from {name!r}" in capsys.readouterr().err


def test_several_candidates_for_the_label_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(_columns(tmp_path, class_id=[1, 2, 3], target=[3, 2, 1]))
    assert [sample.label for sample in source.samples] == [None] * 3
    assert "class_id, target" in source.unlabelled
    assert "class_id, target" in capsys.readouterr().err
    named = open_source(tmp_path / "x.parquet", label_column="Target")
    assert [sample.label for sample in named.samples] == [3, 2, 1]
    source = open_source(_columns(tmp_path, coarse_label=[1, 2, 3], fine_label=[3, 2, 1]))
    assert [sample.label for sample in source.samples] == [3, 2, 1]
    assert "'fine_label', not from coarse_label" in capsys.readouterr().err


def test_a_table_without_a_label_column_is_unlabelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_source(_columns(tmp_path, breed=["a", "b", "c"], width=[1.5, 2.0, 3.0]))
    assert [sample.label for sample in source.samples] == [None] * 3
    assert "breed" in source.unlabelled
    assert "breed" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        [datetime.datetime(2020, 1, day) for day in (1, 2, 3)],
        [datetime.date(2020, 1, day) for day in (1, 2, 3)],
        [{"id": 1, "name": "cat"}] * 3,
        [[{"id": 1}]] * 3,
    ],
    ids=["times", "dates", "structs", "lists of structs"],
)
def test_label_columns_of_unusable_types_are_reported(
    tmp_path: Path, values: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_source(_columns(tmp_path, label=values))
    assert [sample.label for sample in source.samples] == [None] * 3
    assert "'label'" in source.unlabelled
    assert source.unlabelled in capsys.readouterr().err


def test_a_split_column_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_source(_columns(tmp_path, label=[1, 2, 3], split=["train", "test", "train"]))
    assert "'split' tells splits, test (1), train (2)" in capsys.readouterr().err
    for values in (["train"] * 3, ["red", "blue", "red"]):
        open_source(_columns(tmp_path, label=[1, 2, 3], split=values))
        assert "splits" not in capsys.readouterr().err


def test_label_column_none_reads_no_labels(tmp_path: Path) -> None:
    odd = ["0", "1", "cat"]
    for source in (
        _parquet(tmp_path / "x", odd),
        _npz(tmp_path / "x", odd),
        _tar(tmp_path / "x", odd),
        _csv(tmp_path / "y", odd),
    ):
        assert {sample.label for sample in open_source(source, label_column="none").samples} == {None}


def test_class_names_are_read_from_hugging_face_metadata(tmp_path: Path) -> None:
    def write(name: str, names: Any, labels: list[Any], column: str = "label") -> Path:
        feature = {"info": {"features": {column: {"names": names, "_type": "ClassLabel"}}}}
        table = pa.table({"image": [_png()] * len(labels), column: labels, "size": ["s"] * len(labels)})
        path = tmp_path / name / "x.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata({b"huggingface": json.dumps(feature).encode()}), path)
        return path

    assert list(open_source(write("a", ["dog", "cat"], [1, 0])).class_names) == ["dog", "cat"]
    assert list(open_source(write("b", {"1": "cat", "0": "dog"}, [1, 0])).class_names) == ["dog", "cat"]
    source = open_source(write("c", ["dog", "cat"], ["cat", "dog"]))  # text labels instead of the usual indices
    assert ([sample.label for sample in source.samples], list(source.class_names)) == ([1, 0], ["dog", "cat"])
    assert [s.label for s in open_source(write("d", ["dog", "cat"], [1, 0], "breed")).samples] == [1, 0]
    write("e", ["dog", "cat"], [1, 0]).rename(tmp_path / "e" / "first.parquet")
    write("e", ["cat", "dog"], [1, 0])
    with refused(SourceError, None, "x.parquet", "'dog'", "'cat'"):
        open_source(tmp_path / "e")


class Names(Items):
    """A custom data set with `classes`."""

    classes = ("dog", "cat")


def test_class_names_of_a_custom_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    Items.labels = ["cat", "dog"]
    source = open_source(f"python:{__name__}:Names")
    assert ([sample.label for sample in source.samples], list(source.class_names)) == ([1, 0], ["dog", "cat"])
    Items.labels = [["a photo", "a picture"], ["a third"]]
    source = open_source(f"python:{__name__}:Items")
    assert [sample.label for sample in source.samples] == [None, None]
    assert "2 values" in source.unlabelled
    assert "2 values" in capsys.readouterr().err


def test_unicode_forms_of_a_name_are_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names that differ in Unicode form are one class; names that differ in case are two, and are reported."""
    source = open_source(_csv(tmp_path / "x", ["caf\u00e9", "cafe\u0301", "Dog", "dog"]))
    assert [sample.label for sample in source.samples] == [1, 1, 0, 2]
    assert source.class_names == ["Dog", "cafe\u0301", "dog"]
    stderr = capsys.readouterr().err
    assert "'Dog', 'dog'" in stderr
    assert "1 class names are written in two forms of Unicode" in stderr


def test_labels_are_read_from_tar_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for member in ("label", "target"):
        assert [s.label for s in open_source(_tar(tmp_path / "x", ["3", "1"], member)).samples] == [3, 1]
    assert "'target'" in capsys.readouterr().err


def test_a_limit_does_not_renumber_text_labels(tmp_path: Path) -> None:
    for name, write in TEXT.items():
        if name != "python":
            source = open_source(write(tmp_path / name, ["dog", "cat", "ant"]), limit_first=1)
            assert [sample.label for sample in source.samples] == [2], name
