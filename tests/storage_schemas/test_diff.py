"""Comparing artifacts: which groups differ, by how much, and what does not count as a difference."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from storage_schemas import Artifact, ArtifactWriter, CorruptShard, Layout, Location, Record, open_artifact
from storage_schemas.operations.convert import convert
from storage_schemas.operations.diff import diff
from storage_schemas.operations.remerge import Remerge, remerge
from storage_schemas.schema.factors import FactorKind
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
Make = Callable[..., list[list[Record]]]


def _changed(folder: Path, layout: Layout, make_shards: Make, change: Callable[[Record], Record | None]) -> Artifact:
    writer = ArtifactWriter(Location(folder), layout, {})
    writer.begin({})
    for shard, records in enumerate(make_shards(layout)):
        writer.commit(shard, [new for record in records if (new := change(record)) is not None], [])
    writer.finish()
    return open_artifact(folder)


def _with(record: Record, name: str, array: Any) -> Record:
    return dataclasses.replace(record, arrays={**record.arrays, name: array})


def test_artifacts_of_different_formats_are_equal(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, encoding_name: str
) -> None:
    for name in ("zarr", "webdataset"):
        write_artifact(tmp_path / name, make_layout(name, encoding_name))
    counts: list[int] = []
    found = diff(open_artifact(tmp_path / "zarr"), open_artifact(tmp_path / "webdataset"), advance=counts.append)
    assert found.equal
    assert (found.compared, found.furthest, sum(counts)) == (7, {}, 7)
    assert found.settings == {"format": ["zarr", "webdataset"]}


def test_encodings_differ_by_rounding(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    artifact = open_artifact(tmp_path / "a")
    convert(artifact, Location(tmp_path / "b"), "zarr", "float32")
    other = open_artifact(tmp_path / "b")
    found = diff(artifact, other)
    assert found.furthest.keys() == {"variance"}
    assert 0 < found.furthest["variance"] < 1e-6
    assert diff(artifact, other, tolerance=1e-6).equal


@pytest.mark.parametrize("encoding", ["uint8_moments", "float32"])
def test_different_groups_and_their_distances_are_listed(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, make_shards: Make, encoding: str
) -> None:
    layout = make_layout("zarr", encoding)
    records = {record.key: record for record in write_artifact(tmp_path / "a", layout)}
    first = layout.arrays[0].name

    def change(record: Record) -> Record | None:
        if record.key == "k1":
            array = record.arrays[first].copy()
            array[0, 0, 0] += 1 if encoding == "uint8_moments" else 0.5
            return _with(record, first, array)
        if record.key == "k3":
            return dataclasses.replace(record, label=9)
        if record.key == "k4":
            return _with(record, "target", record.arrays["target"] + np.float32(0.25))  # type: ignore[operator]
        if record.key == "k6":
            members = record.arrays["members"].copy()
            members[0, 0, 0, 0] ^= np.uint8(128)
            return _with(record, "members", members)
        return {"k2": None, "k5": dataclasses.replace(record, key="new")}.get(record.key, record)

    found = diff(open_artifact(tmp_path / "a"), _changed(tmp_path / "b", layout, make_shards, change))
    assert not found.equal
    assert (found.only_in_a, found.only_in_b, found.compared) == (["k2", "k5"], ["new"], 5)
    by_key = {group.key: group for group in found.different}
    assert by_key.keys() == {"k1", "k3", "k4", "k6"}
    step = 1 / (255 * records["k1"].count) if encoding == "uint8_moments" else 0.5
    assert by_key["k1"].distance["mean"] == pytest.approx(step)
    assert by_key["k3"].facts == {"label": [3, 9]}
    assert by_key["k3"].distance == {}
    assert by_key["k4"].distance == {"target": pytest.approx(0.25)}
    assert by_key["k6"].distance == {"members": 128.0}
    assert found.furthest["members"] == 128.0
    assert json.loads(json.dumps(found.as_json()))["only_in_b"] == ["new"]


def test_the_order_of_groups_is_no_difference(
    tmp_path: Path, make_layout: Callable[..., Layout], make_record: Callable[..., Record]
) -> None:
    layout = make_layout("zarr")
    artifacts = []
    for name, order in (("a", [0, 1, 2, 3, 4, 5, 6]), ("b", [5, 3, 6, 0, 2, 1, 4])):
        writer = ArtifactWriter(Location(tmp_path / name), layout, {})
        writer.begin({})
        for shard in range(3):
            writer.commit(shard, [make_record(number, layout) for number in order[3 * shard : 3 * shard + 3]], [])
        writer.finish()
        artifacts.append(open_artifact(tmp_path / name))
    assert diff(artifacts[0], artifacts[1]).equal


def test_an_array_of_only_one_artifact_is_a_difference(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    write_artifact(tmp_path / "b", make_layout("zarr", extras=("target",)))
    found = diff(open_artifact(tmp_path / "a"), open_artifact(tmp_path / "b"), tolerance=1e9)
    assert len(found.different) == 7
    assert found.different[0].distance == {"members": None, "clean": None}


def test_different_heads_are_a_difference(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    heads = [{"head.safetensors": save({"weight": np.full((2, 6), i, np.float32)})} for i in (0, 0, 1)]
    for name, files in zip("abc", heads, strict=True):
        write_artifact(tmp_path / name, make_layout(), (), files)
    write_artifact(tmp_path / "d", make_layout())
    a, b, c, d = (open_artifact(tmp_path / name) for name in "abcd")
    assert diff(a, b).equal
    for other in (c, d):
        assert diff(a, other).head
        assert not diff(other, a).equal


def test_damage_is_an_error(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write) -> None:
    """Bytes are read and checked; sidecars that agree do not make artifacts equal."""
    for name in "ab":
        write_artifact(tmp_path / name, make_layout("webdataset"))
    shard = tmp_path / "b" / "shards" / "00001.tar"
    data = bytearray(shard.read_bytes())
    for index in range(len(data) // 3, len(data)):
        data[index] ^= 1
    shard.write_bytes(data)
    with refused(CorruptShard, None, tmp_path, "00001"):
        diff(open_artifact(tmp_path / "a"), open_artifact(tmp_path / "b"))


def test_different_factors_are_a_difference(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout())
    kinds: tuple[FactorKind, ...] = ("sketch", "principal")
    for kind in kinds:
        remerge(open_artifact(tmp_path / "a"), Location(tmp_path / kind), Remerge(factors=1, factor_kind=kind))
    found = diff(open_artifact(tmp_path / "sketch"), open_artifact(tmp_path / "principal"))
    assert not found.equal
    assert found.furthest.keys() == {"factors"}
