"""Records survive writing and reading in every format, encoding and location."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.numpy import save

from storage_schemas import Artifact, CorruptShard, Layout, NotAnArtifact, Record, SchemaError, open_artifact
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]


@pytest.mark.parametrize("extras", [(), ("target",), ("members", "clean"), ("target", "members", "clean")])
def test_round_trip(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    encoding_name: str,
    extras: tuple[str, ...],
) -> None:
    records = write_artifact(tmp_path / "a", make_layout(format_name, encoding_name, extras))
    artifact = open_artifact(tmp_path / "a")
    assert len(artifact) == len(records) == 7
    assert artifact.shard_sizes == [3, 3, 1]
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    for index in range(-7, 7):
        same_record(artifact[index], records[index])
    for index, record in enumerate(records):
        assert artifact.index_of(record.key) == index
        same_record(artifact[record.key], record)


def test_unknown_indices_and_keys_raise_errors(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    write_artifact(tmp_path / "a", make_layout(format_name))
    artifact = open_artifact(tmp_path / "a")
    for index in (7, -8, 10**9):
        with pytest.raises(IndexError, match="of 7"):
            artifact[index]
    for key in ("k99", "k00", "a", "z", ""):
        with pytest.raises(KeyError, match=f"'{key}'"):
            artifact.index_of(key)
        with pytest.raises(KeyError, match=f"'{key}'"):
            artifact[key]


@pytest.mark.parametrize("rejected", [(1,), (0, 3, 6), (3, 4, 5), (0, 1, 2, 3, 4, 5, 6)])
def test_rejected_groups_leave_the_index_right(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    rejected: tuple[int, ...],
) -> None:
    """Shards may have fewer groups than planned, or none."""
    records = write_artifact(tmp_path / "a", make_layout(format_name), rejected)
    artifact = open_artifact(tmp_path / "a")
    assert len(artifact) == 7 - len(rejected)
    assert [record.key for record in records] == [f"k{n}" for n in range(7) if n not in rejected]
    for index, expected in enumerate(records):
        same_record(artifact[index], expected)
        assert artifact.index_of(expected.key) == index
    assert [entry.rejected for entry in artifact.manifest.shards] == [
        sum(first <= n < first + 3 for n in rejected) for first in (0, 3, 6)
    ]
    sidecars = [artifact.commit(position) for position in range(3)]
    assert {reject.key for commit in sidecars for reject in commit.rejects} == {f"k{n}" for n in rejected}


@pytest.mark.parametrize("encoding", ["uint8_moments", "float32"])
def test_checksums_are_the_same_in_every_format(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, encoding: str
) -> None:
    checksums: list[list[dict[str, str]]] = []
    for name in ("zarr", "webdataset"):
        write_artifact(tmp_path / name, make_layout(name, encoding))
        artifact = open_artifact(tmp_path / name)
        checksums.append([entry.checksums for p in range(3) for entry in artifact.commit(p).records])
    assert checksums[0] == checksums[1]
    assert len({tuple(sums.values()) for sums in checksums[0]}) == 7


@pytest.fixture
def memory_url() -> Any:
    url = "memory://datamerge-tests/artifact"
    yield url
    fsspec.filesystem("memory").rm("/datamerge-tests", recursive=True)


def test_artifacts_live_anywhere_fsspec_reaches(
    memory_url: str,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    encoding_name: str,
) -> None:
    records = write_artifact(memory_url, make_layout(format_name, encoding_name))
    artifact = open_artifact(memory_url)
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    same_record(artifact[-1], records[-1])


def test_a_missing_remote_shard_is_corruption(
    memory_url: str, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str
) -> None:
    write_artifact(memory_url, make_layout(format_name))
    files = fsspec.filesystem("memory")
    for path in files.find("/datamerge-tests/artifact"):
        if "/shards/" in path or "/c/" in path:
            files.rm_file(path)
    artifact = open_artifact(memory_url)
    for index in range(7):
        with pytest.raises(CorruptShard):
            artifact[index]


def test_odd_folder_names_are_accepted(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, same_record: Same, format_name: str
) -> None:
    path = tmp_path / "run [3] #2 ünï%20*" / "a"
    records = write_artifact(path, make_layout(format_name))
    for found, expected in zip(open_artifact(path), records, strict=True):
        same_record(found, expected)


@pytest.mark.parametrize("used", [False, True])
def test_a_pickled_artifact_reads_the_same(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    used: bool,
) -> None:
    """Before and after it has opened files."""
    records = write_artifact(tmp_path / "a", make_layout(format_name))
    artifact = open_artifact(tmp_path / "a")
    if used:
        list(artifact)
    data = pickle.dumps(artifact)
    assert len(data) < 20_000
    copy = pickle.loads(data)
    assert isinstance(copy, Artifact)
    for found, expected in zip(copy, records, strict=True):
        same_record(found, expected)


def test_stored_arrays_are_read_only_and_properties_are_copies(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    encoding_name: str,
) -> None:
    """A consumer that works in place can damage neither the file nor what the next reader sees."""
    records = write_artifact(tmp_path / "a", make_layout(format_name, encoding_name))
    artifact = open_artifact(tmp_path / "a")
    for array in artifact[0].arrays.values():
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for name in ("mean", "mean_square", "variance", "target", "members", "clean"):
        getattr(artifact[0], name)[...] = 0  # a copy, which torch.from_numpy takes without a warning
    same_record(artifact[0], records[0])


def test_head_round_trip(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write) -> None:
    tensors = {"weight": np.arange(12, dtype=np.float32).reshape(2, 6), "scale": np.array([100.0], np.float32)}
    data = save(tensors, metadata={"names": '["cat", "Löwe"]'})
    write_artifact(tmp_path / "a", make_layout(), (), {"head.safetensors": data})
    head = open_artifact(tmp_path / "a").head()
    assert head is not None
    assert head[1] == ["cat", "Löwe"]
    assert head[0].keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(head[0][name], tensor)


def test_no_head_is_none(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write) -> None:
    write_artifact(tmp_path / "a", make_layout())
    assert open_artifact(tmp_path / "a").head() is None


@pytest.mark.parametrize(
    "data",
    [
        b"no safetensors",
        save({"bias": np.zeros(2, np.float32)}),
        save({"weight": np.zeros(2, np.float32)}),
        save({"weight": np.zeros((2, 2), np.float32), "other": np.zeros(1, np.float32)}),
    ],
    ids=["garbage", "no weight", "flat weight", "strange tensor"],
)
def test_a_file_that_is_no_head_is_named(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, data: bytes
) -> None:
    write_artifact(tmp_path / "a", make_layout(), (), {"head.safetensors": data})
    with refused(SchemaError, None, tmp_path / "a" / "head.safetensors"):
        open_artifact(tmp_path / "a").head()


@pytest.mark.parametrize("kind", ["missing", "empty folder", "a file"])
def test_places_without_an_artifact_are_refused(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "x"
    if kind == "empty folder":
        place.mkdir()
    if kind == "a file":
        place.write_text("hello")
    with refused(NotAnArtifact, None, place, "manifest.json"):
        open_artifact(place)
