"""Data sets saved by Hugging Face datasets, and Arrow files of other writers: samples, labels, names and splits."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from datamerge.sources import BadImage, Source, native_shape, open_source
from storage_schemas import ConfigError, SourceError
from tests.support.refusals import refused

NAMES = ["cat", "dog", "fox"]


def _pixels(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (5, 4, 3), np.uint8)


def _data_set(numbers: range) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [Image.fromarray(_pixels(n)) for n in numbers], "label": [n % 3 for n in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def _check(source: Source, numbers: range) -> None:
    assert source.kind == "arrow"
    assert [sample.label for sample in source.samples] == [number % 3 for number in numbers]
    assert source.class_names == NAMES
    assert len({sample.key for sample in source.samples}) == len(numbers)
    reader = pickle.loads(pickle.dumps(source.reader))
    for sample, number in zip(source.samples, numbers, strict=True):
        raw = reader.read(sample)
        assert native_shape(raw) == (3, 5, 4)
        with Image.open(io.BytesIO(raw)) as image:
            np.testing.assert_array_equal(np.asarray(image), _pixels(number))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_saved_data_set_is_read(tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]) -> None:
    _data_set(range(7)).save_to_disk(tmp_path, num_shards=shards)
    _check(open_source(tmp_path), range(7))
    assert "left out" not in capsys.readouterr().err
    first = next(tmp_path.glob("*.arrow"))
    _check(open_source(first), range(len(open_source(first).samples)))


def test_caches_in_a_saved_data_set_are_left_out(tmp_path: Path) -> None:
    _data_set(range(4)).save_to_disk(tmp_path)
    loaded = datasets.load_from_disk(str(tmp_path))
    loaded.map(lambda row: {"label": 2 - row["label"]})
    assert len(list(tmp_path.glob("*.arrow"))) == 2
    source = open_source(tmp_path)
    _check(source, range(4))
    assert source.left_out == {".arrow that are caches": 1}


def test_splits_of_a_saved_dictionary_are_read(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": _data_set(range(5)), "test": _data_set(range(2))})
    splits.save_to_disk(tmp_path)
    _check(open_source(tmp_path, split="train"), range(5))
    _check(open_source(tmp_path, split="test"), range(2))
    with refused(ConfigError, "split", tmp_path, "train (1 Arrow file)", "test (1 Arrow file)"):
        open_source(tmp_path)
    only = tmp_path / "only"
    datasets.DatasetDict({"train": _data_set(range(3))}).save_to_disk(only)
    _check(open_source(only), range(3))


def test_saved_data_sets_are_read_through_fsspec(tmp_path: Path) -> None:
    _data_set(range(3)).save_to_disk(tmp_path)
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), "/arrow-test", recursive=True)
    try:
        _check(open_source("memory://arrow-test"), range(3))
    finally:
        files.rm("/arrow-test", recursive=True)


def test_an_arrow_file_with_footer_takes_class_names_from_dataset_info(tmp_path: Path) -> None:
    _data_set(range(3)).save_to_disk(tmp_path / "saved")
    with pa.ipc.open_stream(next((tmp_path / "saved").glob("*.arrow"))) as stream:
        table = stream.read_all().replace_schema_metadata(None)
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    info = (tmp_path / "saved/dataset_info.json").read_bytes()
    (tmp_path / "dataset_info.json").write_bytes(info)
    _check(open_source(tmp_path / "x.arrow"), range(3))


@pytest.mark.parametrize("data", [b"", b"ARROW1\0\0nothing", b"\xff\xff\xff\xff\x10\0\0\0", b"text text text"])
def test_files_that_are_not_arrow_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.arrow").write_bytes(data)
    for where in (tmp_path, tmp_path / "x.arrow"):
        with refused(SourceError, None, tmp_path / "x.arrow", "Arrow"):
            open_source(where)


def test_an_invalid_state_json_is_refused(tmp_path: Path) -> None:
    _data_set(range(2)).save_to_disk(tmp_path)
    (tmp_path / "state.json").write_text("[]")
    with refused(SourceError, None, tmp_path / "state.json", "save_to_disk"):
        open_source(tmp_path)


def test_a_row_of_a_file_that_is_cut_later_is_a_bad_image(tmp_path: Path) -> None:
    _data_set(range(4)).save_to_disk(tmp_path)
    source = open_source(tmp_path)
    path = next(tmp_path.glob("*.arrow"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadImage, match="row 3 of"):
        source.reader.read(source.samples[3])
