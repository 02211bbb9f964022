"""labels.csv as spreadsheets, pandas and people write it."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from datamerge.sources import open_source
from storage_schemas import SourceError
from tests.support.refusals import refused

NAMES = ("a.png", "b.png", "sub/c.jpg", "caf\u00e9.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"image")
    return tmp_path


ROWS = "a.png,3\nb.png,11\nsub/c.jpg,0\ncaf\u00e9.png,2\n"


def _forms() -> dict[str, str | bytes]:
    table = f"file,label\n{ROWS}"
    return {
        "plain": table,
        "BOM": b"\xef\xbb\xbf" + table.encode(),
        "UTF-16": table.encode("utf-16"),
        "CRLF": table.replace("\n", "\r\n"),
        "CR": table.replace("\n", "\r"),
        "semicolons": table.replace(",", ";"),
        "tabs": table.replace(",", "\t"),
        "bars": table.replace(",", " | "),
        "spaces": table.replace(",", " "),
        "Excel's first line": "sep=;\n" + table.replace(",", ";"),
        "blank lines": table.replace("\n", "\n\n"),
        "spaces around cells": table.replace(",", " , "),
        "quotes": table.replace("a.png", '"a.png"').replace("11", '"11"'),
        "quotes after a space": table.replace(",11", ', "11"'),
        "trailing separator": table.replace("\n", ",\n"),
        "no header": ROWS,
        "other header": f"bild,klasse\n{ROWS}",
        "capitals": f"File,Label\n{ROWS}",
        "path and class": f"path,class\n{ROWS}",
        "image and target": f"image,target\n{ROWS}",
        "order": "label,file\n3,a.png\n11,b.png\n0,sub/c.jpg\n2,caf\u00e9.png\n",
        "pandas' index": ",file,label\n0,a.png,3\n1,b.png,11\n2,sub/c.jpg,0\n3,caf\u00e9.png,2\n",
        "./": table.replace("a.png", "./a.png"),
        "backslashes": table.replace("sub/c", "sub\\c"),
        "slash in front": table.replace("a.png", "/a.png"),
        "capital suffix": table.replace("a.png", "a.PNG"),
        "other case": table.replace("sub/c.jpg", "Sub/C.JPG"),
        "other suffix": table.replace("c.jpg", "c.jpeg"),
        "no suffix": table.replace("a.png", "a"),
        "NFD": unicodedata.normalize("NFD", table),
        "rows of missing files": table + "gone.png,7\n",
        "the same row twice": table + "a.png,3\n",
        "lists of one": "file,label\na.png,[3]\nb.png,[11]\nsub/c.jpg,tensor(0)\ncaf\u00e9.png,np.int64(2)\n",
        "floats": "file,label\na.png,3.0\nb.png,11.0\nsub/c.jpg,0.0\ncaf\u00e9.png,2.0\n",
    }


@pytest.mark.parametrize("form", _forms())
def test_tables_of_every_form_are_read(folder: Path, form: str) -> None:
    text = _forms()[form]
    (folder / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    found = {sample.name: sample.label for sample in open_source(folder).samples}
    assert found == {"a.png": 3, "b.png": 11, "sub/c.jpg": 0, "caf\u00e9.png": 2}


@pytest.mark.parametrize(
    ("table", "facts"),
    [
        ("file,label\na.png,3\na.png,4\n", ("a.png", "line 2", "line 3", "'3'", "'4'")),
        ("file,label\na.png,3\n./a.png,4\n", ("a.png", "line 2", "line 3")),
        ("file,label\na.png,3\nA.PNG,4\n", ("a.png", "line 2", "line 3")),
        ("file,label\na.png,tench, Tinca tinca\n", ("line 2", 3, 2)),
        ("file,label\ngone.png,3\n", ("'gone.png'", " 1 ", "a.png")),
        ("file,label\n", ("'file'", " 0 ")),
        ("", ("file,label",)),
        ("author,label\nx,1\n", ("'file'", ["author", "label"])),
        ("file,label\na.png,0\nb.png,dog\nsub/c.jpg,1\n", ("'dog'", "line 3")),
        ("file,label\na.png,0\nb.png,99999999999\n", (2**31 - 1, "line 3")),
        ("file,label\na.png,0\nb.png,1.5\n", ("1.5", "line 3")),
        ("file,label\n\na.png,0\n\nb.png,1.5\n", ("1.5", "line 5")),
    ],
)
def test_wrong_tables_are_refused_with_the_line(folder: Path, table: str, facts: tuple[object, ...]) -> None:
    (folder / "labels.csv").write_text(table)
    with refused(SourceError, None, folder / "labels.csv", *facts):
        open_source(folder)


def test_a_row_that_may_mean_two_images_is_refused(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"image")
    (folder / "labels.csv").write_text("file,label\nb.png,2\na,1\n")
    with refused(SourceError, None, "line 3", "a.jpg", "a.png"):
        open_source(folder)
    (folder / "labels.csv").write_text("file,label\na.png,2\na,1\n")  # a.png has a row, so `a` is a.jpg
    assert [sample.label for sample in open_source(folder).samples] == [1, 2, None, None, None]


def test_a_table_that_is_not_utf_8_is_refused(folder: Path) -> None:
    (folder / "labels.csv").write_bytes(b"file,label\na.png,caf\xe9\n")
    with refused(SourceError, None, folder / "labels.csv", "UTF-8"):
        open_source(folder)


def test_rows_and_images_without_a_match_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels.csv").write_text("file,label\na.png,dog\ngone.png,cat\nlost.png,cat\nb.PNG,cat\n")
    source = open_source(folder)
    assert [sample.label for sample in source.samples] == [1, 0, None, None]
    assert source.class_names == ["cat", "dog"]
    stderr = capsys.readouterr().err
    for fact in ("2 rows", "'gone.png' in line 3", "2 of 4 images have no row", "1 rows name their image"):
        assert fact in stderr


def test_labels_need_one_unambiguous_column(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels.csv").write_text("file,author,place\na.png,x,1\nb.png,y,2\n")
    source = open_source(folder, group_column="author")
    assert [(sample.label, sample.group) for sample in source.samples][:2] == [(1, "x"), (2, "y")]
    source = open_source(folder)
    assert {sample.label for sample in source.samples} == {None}
    assert "author, place" in source.unlabelled
    assert "author, place" in capsys.readouterr().err


def test_two_label_columns_and_a_split_column_are_reported(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "labels.csv").write_text("file,label,label,split\na.png,3,1,train\nb.png,4,1,test\n")
    assert {sample.name: sample.label for sample in open_source(folder).samples}["b.png"] == 4
    stderr = capsys.readouterr().err
    assert "2 columns are called 'label'" in stderr
    assert "'split' tells splits, test (1), train (1)" in stderr


ONE_HOT = "image,age,MEL,NV,BCC\na.png,7,0,1,0\nb.png,8,0,0,1\nsub/c.jpg,9,0,1,0\n"


@pytest.mark.parametrize("table", [ONE_HOT, ONE_HOT.replace(",0", ",0.0").replace(",1", ",1.0")], ids=["0", "0.0"])
def test_one_column_a_class_is_read_as_labels(folder: Path, capsys: pytest.CaptureFixture[str], table: str) -> None:
    (folder / "labels.csv").write_text(table)
    source = open_source(folder)
    assert {sample.name: sample.label for sample in source.samples} == {
        **{"a.png": 1, "b.png": 2},
        **{"sub/c.jpg": 1, "caf\u00e9.png": None},
    }
    assert (source.class_names, source.unlabelled) == (["MEL", "NV", "BCC"], "")
    assert "MEL, NV, BCC hold one 1 a row, taken as 3 classes" in capsys.readouterr().err
    source = open_source(folder, label_column="NV")
    assert [sample.label for sample in source.samples if sample.name == "b.png"] == [0]
    assert "'NV' is one of 3 columns of 0 and 1" in capsys.readouterr().err


@pytest.mark.parametrize("cells", ["0,0,0", "1,0,1", "1,,0"], ids=["none", "two", "empty"])
def test_columns_that_are_not_one_hot_are_not_labels(
    folder: Path, capsys: pytest.CaptureFixture[str], cells: str
) -> None:
    (folder / "labels.csv").write_text(ONE_HOT.replace("8,0,0,1", f"8,{cells}"))
    source = open_source(folder)
    assert ({sample.label for sample in source.samples}, source.class_names) == ({None}, [])
    assert source.unlabelled in capsys.readouterr().err
    for fact in ("MEL, NV, BCC", "1 of 4", "line 3", "age"):
        assert fact in source.unlabelled
    open_source(folder, label_column="MEL")
    assert "1 images do not have one 1" in capsys.readouterr().err


def test_captions_are_not_columns_of_classes(folder: Path) -> None:
    (folder / "labels.csv").write_text("file,caption,author\na.png,a dog,x\na.png,a cat,x\n")
    assert {sample.label for sample in open_source(folder).samples} == {None}
