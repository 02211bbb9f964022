"""Looking up records by key in artifacts whose keys are in random order."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage_schemas import ArtifactWriter, CorruptShard, Location, open_artifact
from storage_schemas.card.finish import finish
from storage_schemas.key_index import ENTRY, rows_of
from storage_schemas.schema.manifest import KEYS, FileEntry
from storage_schemas.verify import fix, verify
from tests.support.artifacts import PROVENANCE, build_layout, build_record

GROUPS = 60  # in 20 shards


def write_scattered(folder: Path, keys: list[str]) -> ArtifactWriter:
    """Write an artifact with these keys in this order; the second group of every seventh shard is rejected."""
    layout = build_layout(extras=(), groups=len(keys))
    writer = ArtifactWriter(Location(folder), layout, PROVENANCE)
    writer.begin({})
    for shard in range(layout.shards):
        part = range(shard * 3, min(shard * 3 + 3, len(keys)))
        records = [dataclasses.replace(build_record(number, layout), key=keys[number]) for number in part]
        writer.commit(shard, [record for n, record in enumerate(records) if n != 1 or shard % 7], [])
    finish(writer)
    return writer


def scattered() -> list[str]:
    return [f"k{number:03d}" for number in np.random.default_rng(0).permutation(GROUPS)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths that are read."""
    paths: list[str] = []
    original = Location.read

    def counted(location: Location, relative: str, *arguments: Any) -> bytes:
        paths.append(relative)
        return original(location, relative, *arguments)

    monkeypatch.setattr(Location, "read", counted)
    return paths


def test_a_lookup_reads_a_range_of_the_index_and_one_sidecar(tmp_path: Path, read: list[str]) -> None:
    write_scattered(tmp_path, scattered())
    artifact = open_artifact(tmp_path)
    stored = [record.key for record in artifact]
    for index, key in enumerate(stored):
        fresh = open_artifact(tmp_path)
        read.clear()
        assert fresh.index_of(key) == index
        assert [path for path in read if path.startswith("commits/")] == read[1:]
        assert (read[0], len(read)) == (KEYS, 2)
        assert artifact[key].key == key
    rejected = set(scattered()) - set(stored)
    assert len(rejected) == 3
    fresh = open_artifact(tmp_path)
    for key in (*rejected, "k999", "", "a/b"):
        with pytest.raises(KeyError, match=f"'{key}'"):
            fresh[key]
    assert not verify(Location(tmp_path)).problems


def test_the_index_is_as_documented(tmp_path: Path) -> None:
    """Rebuilt in pure Python from the sentence in FORMAT.md, independently of the reader."""
    write_scattered(tmp_path, scattered())
    artifact = open_artifact(tmp_path)
    expected = []
    for position in range(len(artifact.shard_sizes)):
        commit = artifact.commit(position)
        for place, record in enumerate(commit.records):
            number = int(hashlib.sha256(record.key.encode()).hexdigest()[:8], 16)
            expected.append((number, commit.shard * 3 + place))
    data = (tmp_path / KEYS).read_bytes()
    found = [
        (int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 4 : at + 12], "little"))
        for at in range(0, len(data), 12)
    ]
    assert found == sorted(expected)


@pytest.mark.parametrize("keys", [sorted(scattered()), scattered()[:9]], ids=["in order", "few shards"])
def test_no_index_is_written_where_key_ranges_suffice(tmp_path: Path, keys: list[str]) -> None:
    write_scattered(tmp_path, keys)
    assert not (tmp_path / KEYS).exists()
    artifact = open_artifact(tmp_path)
    assert all(artifact[record.key].key == record.key for record in artifact)


def _flip(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_flip, _cut, Path.unlink])
def test_a_damaged_index_is_corruption_and_can_be_fixed(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    writer = write_scattered(tmp_path, scattered())
    sound = (tmp_path / KEYS).read_bytes()
    damage(tmp_path / KEYS)
    artifact = open_artifact(tmp_path)
    with pytest.raises(CorruptShard, match=KEYS):
        [artifact[key] for key in scattered()]
    report = verify(Location(tmp_path))
    assert [problem.file for problem in report.problems] == [KEYS]
    fix(Location(tmp_path), report)
    without = open_artifact(tmp_path, partial=True)
    assert [without[record.key].key for record in artifact] == [record.key for record in artifact]
    finish(writer)
    assert (tmp_path / KEYS).read_bytes() == sound
    assert not verify(Location(tmp_path)).problems


def test_keys_of_removed_shards_are_not_found(tmp_path: Path) -> None:
    write_scattered(tmp_path, scattered())
    lost = [record.key for record in open_artifact(tmp_path).commit(4).records]
    (tmp_path / "commits" / "00004.json").unlink()
    fix(Location(tmp_path), verify(Location(tmp_path)))
    artifact = open_artifact(tmp_path, partial=True)
    for key in lost:
        with pytest.raises(KeyError, match=key):
            artifact[key]
    assert all(artifact[artifact.index_of(record.key)].key == record.key for record in artifact)


@settings(max_examples=60)
@given(count=st.integers(0, 3000), seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([4, 12, 32]))
def test_every_entry_is_found_for_any_distribution_of_hashes(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int, bits: int
) -> None:
    """Also if hashes are unevenly spread, or many keys share one."""
    keys = [f"{seed}-{number}" for number in range(count)]
    entries = np.zeros(count, ENTRY)
    # With fewer than 32 bits every second key has the same hash.
    hashes = [int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) for key in keys]
    entries["hash"] = np.array(hashes, np.uint32)
    if bits < 32:
        entries["hash"][1::2] = np.uint32(2**32 - 1) >> np.uint32(32 - bits)
    entries["row"] = np.arange(count)
    ordered = entries[np.lexsort((entries["row"], entries["hash"]))]
    folder = tmp_path_factory.mktemp("index")
    (folder / KEYS).write_bytes(ordered.tobytes())
    entry = FileEntry(path=KEYS, bytes=ordered.nbytes, sha256="0" * 64)
    for number in range(0, count, max(1, count // 20)):
        rows = list(rows_of(Location(folder), entry, keys[number]))
        expected = entries["row"][entries["hash"] == np.uint32(hashes[number])].tolist()
        assert rows == expected
    assert list(rows_of(Location(folder), entry, "another")) == []
