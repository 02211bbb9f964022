"""Shard entries stored by column: documents, JSON and errors as with a tuple, but no object per shard."""

from __future__ import annotations

import gc
import json
import pickle
import pickletools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from storage_schemas import Layout, Record, open_artifact
from storage_schemas.access.threads import AHEAD, in_threads
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.manifest import Manifest, ShardEntry, dump, parse


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    number: Annotated[int, Field(ge=0)]
    span: tuple[str, str] | None


class ByRow(BaseModel):
    model_config = ConfigDict(title="List", strict=True)

    entries: tuple[Entry, ...]


class ByColumn(BaseModel):
    model_config = ConfigDict(title="List", strict=True)

    entries: Columns[Entry]


ENTRIES = [Entry(number=3, span=("a", "b")), Entry(number=4, span=None), Entry(number=9, span=("", "c"))]


def _entries(shards: int) -> Iterator[ShardEntry]:
    for number in range(shards):
        yield ShardEntry(
            shard=number,
            groups=256 + number % 7,
            rejected=number % 3,
            bytes=10**9 + number,
            commit_sha256=f"{number:064x}",
            key_range=(f"k{number:09d}0", f"k{number:09d}9") if number % 5 else None,
        )


@pytest.fixture
def many(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Callable[..., list[Record]]) -> Any:
    """A function that writes an artifact with a given number of shards in its manifest and returns the folder."""

    def make(shards: int) -> Path:
        folder = tmp_path / str(shards)
        write_artifact(folder, make_layout("webdataset"))
        manifest = parse(Manifest, (folder / "manifest.json").read_bytes(), "m")
        sizes = {"groups": 300 * shards, "groups_per_shard": 300}
        changes = {
            "layout": manifest.layout.model_copy(update=sizes),
            "shards": Columns(ShardEntry, _entries(shards)),
        }
        (folder / "manifest.json").write_bytes(dump(manifest.model_copy(update=changes)))
        return folder

    return make


def test_columns_equal_their_source_sequence() -> None:
    columns = Columns(Entry, ENTRIES)
    assert (len(columns), list(columns), columns[1], columns[-1]) == (3, ENTRIES, ENTRIES[1], ENTRIES[2])
    assert columns.column("number") == (3, 4, 9)
    assert list(columns[1:]) == ENTRIES[1:]
    assert list(columns[::-2]) == ENTRIES[::-2]
    assert columns[:2] == Columns(Entry, ENTRIES[:2]) != columns
    assert pickle.loads(pickle.dumps(columns)) == columns
    with pytest.raises(IndexError):
        columns[3]
    assert list(Columns(Entry)) == []
    assert Columns(Entry) == Columns(Entry, iter(()))


def test_json_and_its_schema_are_those_of_a_tuple() -> None:
    for entries in (ENTRIES, []):
        rows, columns = ByRow(entries=tuple(entries)), ByColumn(entries=Columns(Entry, entries))
        assert ByColumn(entries=tuple(entries)) == columns  # type: ignore[arg-type]
        text = rows.model_dump_json(indent=1)
        assert columns.model_dump_json(indent=1) == text
        assert list(ByColumn.model_validate_json(text).entries) == entries
    schemas = [model.model_json_schema(mode="serialization") for model in (ByRow, ByColumn)]
    assert schemas[0] == schemas[1]


@pytest.mark.parametrize(
    "entries",
    [
        None,
        {},
        "text",
        3,
        [[]],
        ["a"],
        [{}],
        [{"number": "3", "span": None}],
        [{"number": 3.0, "span": None, "more": 1}, {"number": 1, "span": None}],
        [{"number": 1, "span": None}, {"number": -1, "span": ["a"]}, None],
        [{"number": 1, "span": ["a", "b", "c"]}],
    ],
)
def test_refusals_are_those_of_a_tuple(entries: Any) -> None:
    found = []
    for model in (ByRow, ByColumn):
        with pytest.raises(ValidationError) as caught:
            model.model_validate_json(json.dumps({"entries": entries}))
        found.append(caught.value.errors(include_url=False))
    assert found[0] == found[1]


def test_the_number_of_objects_does_not_grow_with_shards(many: Callable[[int], Path]) -> None:
    """Memory and the pickle for a data worker grow by plain values only, at most 200 bytes a shard."""
    sizes, calls = [], []
    for shards in (10, 3000):
        artifact = open_artifact(many(shards))
        assert list(artifact.manifest.shards) == list(_entries(shards))
        assert sum(artifact.shard_sizes) == len(artifact) == artifact.manifest.groups
        gc.collect()
        assert not any(type(one) is ShardEntry for one in gc.get_objects())
        data = pickle.dumps(artifact)
        assert pickle.loads(data).manifest == artifact.manifest
        sizes.append(len(data))
        calls.append(
            sum(operation.name in ("BUILD", "REDUCE", "NEWOBJ") for operation, _, _ in pickletools.genops(data))
        )
    assert calls[0] == calls[1]
    assert (sizes[1] - sizes[0]) / 2990 < 200


def test_in_threads_runs_a_bounded_number_of_calls_ahead() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        return -number

    threads = 3
    with in_threads(threads, work, range(1000)) as results:
        assert [next(results) for _ in range(10)] == [-number for number in range(10)]
        assert max(begun) < 10 + AHEAD * threads + 1
    assert len(begun) < 10 + AHEAD * threads + 2
    with in_threads(threads, work, range(7), range(5, 9)) as results, pytest.raises(TypeError):
        next(results)
    with in_threads(threads, work, range(50)) as results:
        assert list(results) == [-number for number in range(50)]


def test_in_threads_runs_calls_concurrently() -> None:
    together = threading.Barrier(4, timeout=60)
    with in_threads(4, lambda _: together.wait(), range(8)) as results:
        assert sorted(results) == [0, 0, 1, 1, 2, 2, 3, 3]
