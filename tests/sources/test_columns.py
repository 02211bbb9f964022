"""Samples as columns against lists of objects; their JSON and gzip against the standard library."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamerge.sources import Sample, Source
from datamerge.sources.coded import Coded
from datamerge.sources.columns import NO_LABEL, Samples, Values, label_column
from datamerge.sources.file_list import FileList
from datamerge.sources.files import Files
from datamerge.sources.labels import NoClass, read_labels
from datamerge.sources.naming import Listed, Naming, Paths, Rows
from datamerge.sources.sample import JsonList, _gzip, fingerprint, make_keys, make_listing
from storage_schemas import Location, SourceError

M = 100_000
# Paths whose keys clash, and paths with a newline, before which Python's `$` also matches.
NAMES = st.lists(st.text("ab._ /-é\n", min_size=1, max_size=6), min_size=1, max_size=12, unique=True)
LABELS = st.none() | st.integers(0, 3)


def _texts(names: Sequence[str]) -> pa.LargeStringArray:
    return pa.array(names, pa.large_string())


@st.composite
def lists(draw: st.DrawFn) -> tuple[list[Sample], Samples]:
    """The same samples as objects and as columns, with each kind of naming."""
    names = draw(NAMES)
    labels = draw(st.lists(LABELS, min_size=len(names), max_size=len(names)))
    values = draw(st.none() | st.lists(st.none() | st.sampled_from("xy"), min_size=len(names), max_size=len(names)))
    naming: Naming
    kind = draw(st.sampled_from(["paths", "rows", "listed"]))
    if kind == "rows":
        cut = draw(st.integers(0, len(names)))
        naming = Rows.of(["f.parquet", "none", "g/h"], ["f", "n", "gh"], [cut, 0, len(names) - cut])
        rows = [("f.parquet", "f", row) for row in range(cut)]
        rows += [("g/h", "gh", row) for row in range(len(names) - cut)]
        keys_and_names = [(f"{stem}-{row:08d}", f"{file}#{row}") for file, stem, row in rows]
    else:
        keys = make_keys(names)
        naming = Paths.of(_texts(names)) if kind == "paths" else Listed.of(names, keys)
        keys_and_names = list(zip(keys, names, strict=True))
    groups = values or [None] * len(names)
    objects = [Sample(*both, label, group) for both, label, group in zip(keys_and_names, labels, groups, strict=True)]
    return objects, Samples(naming, label_column(labels), None if values is None else Values.of(values))


@settings(deadline=None, max_examples=50)
@given(lists(), st.data())
def test_columns_equal_the_list_of_objects(both: tuple[list[Sample], Samples], data: st.DataObject) -> None:
    objects, samples = both
    count = len(objects)
    assert list(samples) == objects == [samples[index] for index in range(count)]
    assert samples == Samples.of(objects)
    assert samples != Samples.of(objects[:-1])
    assert samples[-1] == objects[-1]
    cut = data.draw(st.slices(count))
    assert list(samples[cut]) == objects[cut]
    places = data.draw(st.lists(st.integers(0, count - 1), max_size=2 * count))
    taken = samples.take(np.array(places, np.int64))
    assert list(taken) == [objects[place] for place in places]
    assert taken.keys == [sample.key for sample in taken]
    assert taken.names == [sample.name for sample in taken]
    again = taken.take(np.arange(len(taken))[::-1])[:3]
    assert list(again) == list(taken)[::-1][:3]
    assert pickle.loads(pickle.dumps(again)) == again
    assert samples.used_labels() == sorted({s.label for s in objects if s.label is not None})
    renumbered = [None if s.label is None else 7 - s.label for s in objects]
    assert [s.label for s in samples.relabelled({label: 7 - label for label in range(4)})] == renumbered


def test_indices_out_of_range_raise() -> None:
    samples = Samples.of([Sample("a", "a.png", None)])
    for place in (1, -2):
        with pytest.raises(IndexError, match="of 1"):
            samples[place]


def test_columns_take_few_bytes_a_sample() -> None:
    """Names like ImageNet's with labels and sizes, and rows of tables; a pickled slice holds only its own samples."""
    names = [f"train/n{index // 1300:08d}/n{index // 1300:08d}_{index % 1300}.JPEG" for index in range(M)]
    paths = Samples(Paths.of(_texts(names)), np.zeros(M, np.int32))
    files = FileList(_texts(names), np.zeros(M, np.int64), np.empty(0, np.int64), np.empty((0, 32), np.uint8))
    assert (paths.nbytes + files.nbytes) / M <= 64
    rows = Samples(Rows.of(["a.parquet"] * 100, ["a"] * 100, [M // 100] * 100), np.zeros(M, np.int32))
    assert rows.nbytes / M <= 4.1
    assert rows.take(np.arange(M)).nbytes / M <= 12.1
    for samples in (paths, rows):
        assert len(pickle.dumps(samples[M // 2 : M // 2 + 10])) < 2000


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), max_size=8), st.data())
def test_blocks_of_taken_samples_count_the_rows_of_each_block(sizes: list[int], data: st.DataObject) -> None:
    count = sum(sizes)
    samples = Samples.of(Sample(str(index), str(index), None) for index in range(count))
    blocks = np.array([size for size in sizes if size], np.int64)
    source = Source("u", "parquet", samples, [], "", None, blocks=blocks)  # type: ignore[arg-type]
    places = data.draw(st.sets(st.integers(0, count - 1)) if count else st.just(set()))
    taken = source.take(np.array(sorted(places), np.int64))
    block_of = [block for block, size in enumerate(sizes) for _ in range(size)]
    held = [block_of[place] for place in sorted(places)]
    assert taken.blocks is not None
    assert taken.blocks.tolist() == [held.count(block) for block in dict.fromkeys(held)]
    assert [sample.name for sample in taken.samples] == [str(place) for place in sorted(places)]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.none() | st.integers() | st.text(max_size=3), min_size=1, max_size=4), max_size=4))
def test_fingerprints_hash_the_json(parts: list[list[Any]]) -> None:
    whole = [value for part in parts for value in part]
    expected = hashlib.sha256(json.dumps(["x", whole, {"a": 1}]).encode()).hexdigest()
    assert fingerprint(["x", JsonList(parts), {"a": 1}]) == expected


@pytest.mark.parametrize("small", [True, False])
def test_a_file_list_equals_the_listing(tmp_path: Path, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All files are hashed, or 64 of many; the JSON is written in pieces and its names need escapes."""
    if not small:
        monkeypatch.setattr("datamerge.sources.sample.WHOLE_BYTES", 0)
    monkeypatch.setattr("datamerge.sources.file_list.CHUNK", 16)
    names = sorted([f"a {number:03d}.png" for number in range(100)] + ['q"\\.png', "ünï.png"])
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(bytes(number))
    location = Location(str(tmp_path))
    sizes = list(zip(names, range(len(names)), strict=True))
    expected = make_listing(location, sizes)
    assert sum(digest is not None for _, digest in expected.values()) == (len(names) if small else 64)
    found = FileList.of(location, Files.of(sizes[::-1]))
    assert dict(found.items()) == expected == {name: found[name] for name in found}
    assert "".join(found.json()) == json.dumps(expected)
    with pytest.raises(KeyError):
        found["a.png"]
    source = Source("u", "image_folder", Samples.of([]), [], "", None, found)  # type: ignore[arg-type]
    packed = source.listing_bytes()
    assert packed == _as_gzip(json.dumps(expected, sort_keys=True).encode())
    assert source.changes(packed) == []


def _as_gzip(data: bytes) -> bytes:
    """What Python 3.11 writes; from 3.13 on it leaves the system out of the header, its tenth byte."""
    packed = bytearray(gzip.compress(data, mtime=0))
    packed[9] = 3  # Unix
    return bytes(packed)


@pytest.mark.parametrize("step", [1009, 100_003])
def test_gzip_in_pieces_equals_gzip(step: int) -> None:
    """The data exceed a window of 32 KiB: text that repeats, then random bytes."""
    rng = np.random.default_rng(0)
    text = "".join(f'"n{number // 99:08d}/{rng.integers(10**6)}.JPEG": [1, null], ' for number in range(20_000))
    data = text.encode() + rng.bytes(200_000)
    pieces = (data[start : start + step] for start in range(0, len(data), step))
    assert _gzip(pieces) == _as_gzip(data)


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.none() | st.integers(-1, 9) | st.sampled_from(["cat", "dog", "", "7", "nan", "unknown"]), max_size=9)
)
def test_coded_labels_are_read_as_lists_are(raw: list[Any]) -> None:
    def read(coded: bool) -> tuple[Any, ...] | str:
        try:
            if not coded:
                return read_labels(raw, "here")
            column = Coded()
            column.add(raw[:3])
            distinct = list(dict.fromkeys(["never", *reversed(raw)]))
            column.add_coded(distinct, np.array([distinct.index(value) for value in raw[3:]], np.int64))
            labels, names = column.labels("here", (), "row {}".format)
            return [None if label == NO_LABEL else label for label in labels.tolist()], names
        except (NoClass, SourceError) as error:
            return f"{type(error).__name__}: {error}"

    assert read(coded=True) == read(coded=False)


@pytest.mark.parametrize(
    "values",
    [
        pa.array([3, None, 3, 1]),
        pa.array(["a", "b", None, "a"]),
        pa.array(["a", "b", None, "a"]).dictionary_encode(),
        pa.array([1.5, float("nan"), None, 0.0]),
        pa.array([True, None, False, True]),
        pa.array([[1], None, [2], [1]]),
        pa.array(["a", None, "b", "a"], pa.string_view()),
    ],
    ids=lambda values: str(values.type),
)
def test_arrow_columns_are_added_as_their_values(values: pa.Array) -> None:
    column = pa.chunked_array([values[:1], values[1:1], values[1:]])
    coded = Coded()
    coded.add_column(column, lambda value: None if value is None else str(value))
    found = coded.values()
    assert found.part(0, len(column)) == [None if value is None else str(value) for value in column.to_pylist()]
