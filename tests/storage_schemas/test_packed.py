"""Compact sidecars, and values that threads compute once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage_schemas import Layout, Record, open_artifact
from storage_schemas.access.once import Once
from storage_schemas.schema.packed import PackedCommit


def test_packing_with_facts_is_lossless(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Callable[..., list[Record]],
    format_name: str,
) -> None:
    write_artifact(tmp_path, make_layout(format_name))
    for commit in open_artifact(tmp_path).commits():
        assert list(PackedCommit(commit, facts=True).records) == list(commit.records)


def test_packing_without_facts_drops_samples_and_info_only(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Callable[..., list[Record]],
    format_name: str,
) -> None:
    write_artifact(tmp_path, make_layout(format_name))
    artifact = open_artifact(tmp_path)
    for position in range(len(artifact.shard_sizes)):
        commit = artifact.commit(position)
        packed = PackedCommit(commit)
        bare = [record.model_copy(update={"samples": (), "info": {}}) for record in commit.records]
        assert (packed.shard, packed.files, list(packed.records)) == (commit.shard, commit.files, bare)
        assert packed.records[1:] == bare[1:]
        assert packed.records[-1] == bare[-1]


def test_reading_without_facts_drops_samples_and_info_only(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Callable[..., list[Record]],
    same_record: Callable[[Record, Record], None],
    format_name: str,
) -> None:
    records = write_artifact(tmp_path, make_layout(format_name))
    names = [spec.name for spec in make_layout(format_name).arrays]
    for found, stored in zip(open_artifact(tmp_path).only(names, facts=False), records, strict=True):
        assert (found.samples, dict(found.info)) == ((), {})
        assert (found.key, found.count, found.label) == (stored.key, stored.count, stored.label)
        assert all((found.arrays[name] == stored.arrays[name]).all() for name in names)


def test_threads_compute_a_value_once() -> None:
    made, barrier = [], threading.Barrier(4)

    def make() -> str:
        made.append(1)
        return "value"

    def get(once: Once[str, str]) -> str:
        barrier.wait(20)
        return once.get("key", make)

    once = Once[str, str](2)
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(get, [once] * 4)) == ["value"] * 4
    assert made == [1]
    for key in ("b", "c"):
        once.get(key, make)
    assert ("key" in once, "c" in once) == (False, True)


def test_a_failed_computation_is_repeated() -> None:
    once = Once[str, str](2)

    def fail() -> str:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        once.get("key", fail)
    assert once.get("key", lambda: "value") == "value"
