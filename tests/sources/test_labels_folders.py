"""Class folders: their level, images beside them, and empty ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from datamerge.sources import open_source


def _make(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"image")
    return folder


def _labels(folder: Path) -> dict[str, int | None]:
    return {sample.name: sample.label for sample in open_source(folder).samples}


def test_numbered_folders_are_labels_with_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ImageNet-V2 has folders 0 to 999."""
    _make(tmp_path, [f"{number}/x.png" for number in range(120)])
    assert _labels(tmp_path) == {f"{number}/x.png": number for number in range(120)}
    assert list(open_source(tmp_path).class_names) == [str(number) for number in range(120)]
    assert "0 … 119" in capsys.readouterr().err


def test_numbers_with_gaps_are_labels_without_names(tmp_path: Path) -> None:
    _make(tmp_path, ["003/x.png", "017/x.png", "1000/x.png"])
    assert _labels(tmp_path) == {"003/x.png": 3, "017/x.png": 17, "1000/x.png": 1000}
    assert list(open_source(tmp_path).class_names) == []


@pytest.mark.parametrize("names", [["1.5/a.png", "2.0/b.png"], ["nan/a.png", "null/b.png"], ["3d/a.png", "4d/b.png"]])
def test_folder_names_that_are_not_integers_are_class_names(tmp_path: Path, names: list[str]) -> None:
    _make(tmp_path, names)
    assert _labels(tmp_path) == {names[0]: 0, names[1]: 1}


def test_an_image_beside_class_folders_has_no_label(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The images in the folders keep their labels."""
    _make(tmp_path, ["cat/1.png", "cat/2.png", "dog/1.png", "montage.png"])
    assert _labels(tmp_path) == {"cat/1.png": 0, "cat/2.png": 0, "dog/1.png": 1, "montage.png": None}
    assert "1 of 4 images" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a.png", "b.png", "c.png", "old/1.png"], ["a.png", "x/1.png", "x/2.png"]])
def test_folders_beside_images_are_not_classes(
    tmp_path: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(_labels(_make(tmp_path, names)).values()) == {None}
    assert "not taken as classes" in capsys.readouterr().err


def test_class_folders_are_found_below_a_single_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path, ["data/images/cat/1.png", "data/images/dog/a/2.png"])
    assert list(_labels(tmp_path).values()) == [0, 1]
    assert list(open_source(tmp_path).class_names) == ["cat", "dog"]
    stderr = capsys.readouterr().err
    assert "data/images" in stderr
    assert "1 of 2 images are in folders below their class folder" in stderr


def test_one_folder_is_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path, ["photos/1.png", "photos/2.png"])
    assert set(_labels(tmp_path).values()) == {0}
    assert "the only class" in capsys.readouterr().err


def test_class_folders_without_images_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _make(tmp_path, ["ant/x.xyz", "cat/1.png", "dog/1.png", ".hidden/1.png"])
    (tmp_path / "bee").mkdir()
    assert list(open_source(tmp_path).class_names) == ["cat", "dog"]
    stderr = capsys.readouterr().err
    assert "2 of 4 class folders" in stderr
    assert "ant, bee" in stderr
