"""Splits by the names of folders, files and arrays: chosen, refused with the list, or reported."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamerge.sources import open_source
from datamerge.sources.splits import split_of_file
from storage_schemas import ConfigError, SourceError
from tests.support.refusals import refused
from tests.support.small_sources import photo, put, table, tar


def _arrays(path: Path, **counts: int) -> None:
    arrays: dict[str, Any] = {}
    for split, count in counts.items():
        arrays[f"x_{split}"] = np.full((count, 4, 4, 3), count, np.uint8)
        arrays[f"y_{split}"] = np.full(count, count)
    np.savez(path, **arrays)


def _hub(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        table(folder / f"data/{split}-00000-of-00001.parquet", image=[photo()] * count, label=[count] * count)


def _files(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        table(folder / f"{split}.parquet", image=[photo()] * count, label=[count] * count)


def _tars(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        tar(folder / split / "0.tar", *(f"{number}.png" for number in range(count)))


def _prefixed_tars(folder: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        tar(folder / f"imagenet-{split}-000000.tar", *(f"{number}.png" for number in range(count)))


def _images(folder: Path) -> None:
    put(folder, "train/cat/0.png", "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png")


def _wrapped(folder: Path) -> None:
    _images(folder / "imagenette")


def _years(folder: Path) -> None:
    put(folder, "train2017/0.jpg", "train2017/1.jpg", "train2017/2.jpg", "test2017/0.jpg", "test2017/1.jpg")


def _with_others(folder: Path) -> None:
    _images(folder)
    put(folder, "montage.png", "extra/x.png")


def _class_first(folder: Path) -> None:
    put(folder, "cat/train/0.png", "cat/train/1.png", "dog/train/2.png", "cat/test/3.png", "dog/test/4.png")


LAYOUTS: dict[str, Callable[[Path], None]] = {
    function.__name__: function
    for function in (
        _hub,
        _files,
        _tars,
        _prefixed_tars,
        _images,
        _wrapped,
        _years,
        _with_others,
        _class_first,
    )
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_splits_are_refused_with_the_list(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    with refused(ConfigError, "split", tmp_path, "train", "test", "`split`"):
        open_source(tmp_path)
    with refused(ConfigError, "split", tmp_path, "train", "test", "'validation'"):
        open_source(tmp_path, split="validation")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_named_split_is_read_alone(tmp_path: Path, layout: str) -> None:
    LAYOUTS[layout](tmp_path)
    keys: list[str] = []
    for split, count in (("train", 3), ("test", 2)):
        source = open_source(tmp_path, split=split)
        assert len(source.samples) == count
        assert all(split in sample.name for sample in source.samples)
        assert source.split is not None
        assert source.split.startswith(split)
        keys += [sample.key for sample in source.samples]
    everything = open_source(tmp_path, split="all")
    both = open_source(tmp_path, split="train+test")
    assert sorted(keys) == sorted(sample.key for sample in both.samples)
    assert {*keys} <= {sample.key for sample in everything.samples}


@pytest.mark.parametrize("layout", ["_images", "_wrapped", "_with_others", "_class_first"])
@pytest.mark.parametrize("split", ["train", "test", "train+test"])
def test_split_folders_are_not_classes(tmp_path: Path, layout: str, split: str) -> None:
    LAYOUTS[layout](tmp_path)
    source = open_source(tmp_path, split=split)
    assert source.class_names == ["cat", "dog"]
    for sample in source.samples:
        assert sample.label is not None
        assert source.class_names[sample.label] in sample.name.split("/")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    put(tmp_path, "car/0.png", "train/1.png", "ship/2.png")
    assert open_source(tmp_path).class_names == ["car", "ship", "train"]
    assert open_source(tmp_path, split="all").class_names == ["car", "ship", "train"]


def test_split_all_takes_split_folders_beside_others_as_classes(tmp_path: Path) -> None:
    put(tmp_path, "test/0.png", "train/1.png", "car/2.png")
    assert open_source(tmp_path, split="all").class_names == ["car", "test", "train"]


def test_an_only_split_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "train/cat/0.png", "train/dog/1.png")
    source = open_source(tmp_path)
    assert (source.class_names, source.split) == (["cat", "dog"], "train")
    assert [sample.key for sample in source.samples] == ["train_cat_0", "train_dog_1"]
    assert "its only split is train (2 images)" in capsys.readouterr().err


def test_synonyms_of_a_split_are_accepted(tmp_path: Path) -> None:
    put(tmp_path, "val/cat/0.png", "training/cat/1.png")
    assert open_source(tmp_path, split="validation").split == "val"
    assert open_source(tmp_path, split="train").split == "training"


def test_a_split_of_a_source_without_splits_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    table(tmp_path / "t/x.parquet")
    _hub(tmp_path / "hub")
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8))
    assert len(open_source(tmp_path / "t", split="all").samples) == 1
    for where in (tmp_path / "t", tmp_path / "t/x.parquet", tmp_path / "x.npz", "python:x:y"):
        with refused(ConfigError, "split", where, "'test'"):
            open_source(where, split="test")
    file = tmp_path / "hub/data/test-00000-of-00001.parquet"
    assert open_source(file, split="test").samples == open_source(file).samples


def test_labels_csv_is_read_inside_and_above_split_folders(tmp_path: Path) -> None:
    put(tmp_path, "train/0.png", "train/1.png", "test/0.png")
    (tmp_path / "train/labels.csv").write_text("file,label\n0.png,4\n1.png,2\n")
    assert [sample.label for sample in open_source(tmp_path, split="train").samples] == [4, 2]
    assert [sample.label for sample in open_source(tmp_path, split="test").samples] == [None]
    (tmp_path / "labels.csv").write_text("file,label\ntrain/0.png,7\ntrain/1.png,8\ntest/0.png,9\n")
    assert [sample.label for sample in open_source(tmp_path, split="train").samples] == [7, 8]
    assert [sample.label for sample in open_source(tmp_path, split="test").samples] == [9]


def test_subsets_with_the_same_splits_are_refused(tmp_path: Path) -> None:
    _hub(tmp_path / "160px")
    _hub(tmp_path / "full")
    with refused(SourceError, None, "160px/data/t", "full/data/t"):
        open_source(tmp_path, split="train")


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/train_clean-00000-of-00002-0123456789abcdef.parquet", "train_clean"),
        ("data/unsupervised-00000-of-00001.parquet", "unsupervised"),
        ("cifar10-test-00000-of-00001.arrow", "test"),
        ("validation/data-00000-of-00001.arrow", "validation"),
        ("en/train/x.parquet", "train"),
        ("Train.parquet", "Train"),
        ("val_0001.tar", "val"),
        ("imagenet-valid-000{0}.tar", "valid"),
        ("data-00000-of-00001.parquet", None),
        ("trainer.tar", None),
        ("contest.tar", None),
        ("shard-000.tar", None),
    ],
)
def test_splits_are_recognised_in_file_names(path: str, split: str | None) -> None:
    assert split_of_file(path) == split


def test_arrays_named_as_in_keras_are_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _arrays(tmp_path / "x.npz", train=6, test=2)
    for split, count in ((None, 6), ("train", 6), ("test", 2)):
        source = open_source(tmp_path / "x.npz", split=split)
        assert [sample.label for sample in source.samples] == [count] * count
        assert source.reader.read(source.samples[-1]).getpixel((0, 0)) == (count, count, count)  # type: ignore[union-attr]
    assert "'train' is used of" in capsys.readouterr().err
    train, test = (open_source(tmp_path / "x.npz", split=split) for split in ("train", "test"))
    assert not {sample.key for sample in train.samples} & {sample.key for sample in test.samples}
    assert train.splits == {"test": 2, "train": 6}
    named = open_source(tmp_path / "x.npz", image_column="x_test")
    assert [sample.label for sample in named.samples] == [2, 2]
    assert open_source(tmp_path / "x.npz", image_column="x_test", split="test").samples == test.samples
    with refused(ConfigError, "split", tmp_path / "x.npz", "'x_test'", "'train'"):
        open_source(tmp_path / "x.npz", image_column="x_test", split="train")
    with refused(ConfigError, "split", tmp_path / "x.npz", "one split at a time"):
        open_source(tmp_path / "x.npz", split="train+test")
    _arrays(tmp_path / "x.npz", val=6, test=2)
    with refused(ConfigError, "split", tmp_path / "x.npz", "val (6 images)", "test (2 images)"):
        open_source(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("images", "labels"),
    [("train_images", "train_labels"), ("X_train", "y_train"), ("images_train", "label_train")],
)
def test_other_spellings_of_arrays_in_splits(tmp_path: Path, images: str, labels: str) -> None:
    arrays: dict[str, Any] = {images: np.zeros((3, 4, 4), np.uint8), labels: np.arange(3)[:, None]}
    arrays |= {name.replace("train", "val"): array[:2] for name, array in arrays.items()}
    np.savez(tmp_path / "x.npz", **arrays)
    assert [sample.label for sample in open_source(tmp_path / "x.npz").samples] == [0, 1, 2]
    assert len(open_source(tmp_path / "x.npz", split="validation").samples) == 2


def test_the_output_of_img2dataset_is_read_as_tars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in ("00000", "00001"):
        tar(tmp_path / f"{shard}.tar", f"{shard}0.jpg", f"{shard}1.jpg")
        facts = {"url": ["u"] * 2, "key": [f"{shard}0", f"{shard}1"], "status": ["success"] * 2}
        pq.write_table(pa.table(facts), tmp_path / f"{shard}.parquet")
        put(tmp_path, f"{shard}_stats.json", data=b"{}")
    source = open_source(tmp_path)
    assert (source.kind, len(source.samples)) == ("webdataset", 4)
    assert "2 .parquet without images" in capsys.readouterr().err


def test_class_names_beside_the_tars_of_clip_benchmark_are_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        with tarfile.open(tmp_path / split / "0.tar", "w") as archive:
            for number in range(3):
                for suffix, data in (("webp", photo("WEBP")), ("cls", str(number).encode())):
                    info = tarfile.TarInfo(f"s{number:07d}.{suffix}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        put(tmp_path, f"{split}/nshards.txt", data=b"1\n")
    put(tmp_path, "classnames.txt", data=b"\xef\xbb\xbfcat\r\ndog\r\nold fox\r\n")
    put(tmp_path, "zeroshot_classification_templates.txt", data=b"a photo of {c}\n")
    sources = [
        open_source(tmp_path, split="test"),
        open_source(tmp_path / "test"),
        open_source(tmp_path / "test/0.tar"),
    ]
    for source in sources:
        assert source.class_names == ["cat", "dog", "old fox"]
        assert [sample.label for sample in source.samples] == [0, 1, 2]
    put(tmp_path, "classnames.txt", data=b"cat\ndog\n")
    assert open_source(tmp_path, split="test").class_names == []
