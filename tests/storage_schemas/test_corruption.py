"""Damaged files: reading gives the committed values or CorruptShard, never anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage_schemas import Artifact, CorruptShard, Layout, Record, open_artifact
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]

VICTIM = 1  # the shard that is damaged; 0 and 2 must stay readable


def _files(folder: Path, shard: int) -> list[Path]:
    """Array files of a shard in either format."""
    tar = folder / "shards" / f"{shard:05d}.tar"
    if tar.exists():
        return [tar]
    names = ("sum", "scatter", "mean", "mean_square", "target", "members", "clean")
    chunks = [folder / "groups.zarr" / name / "c" / str(shard) for name in names]
    return [path for chunk in chunks for path in (chunk.rglob("*") if chunk.exists() else []) if path.is_file()]


def _read_all(folder: Path, records: list[Record], same_record: Same) -> list[str]:
    """Keys of the records that are refused; the values of all others are checked."""
    refused = []
    artifact = open_artifact(folder)
    for index, expected in enumerate(records):
        try:
            found = artifact[index]
        except CorruptShard as error:
            assert "\n" not in str(error)
            refused.append(expected.key)
        else:
            same_record(found, expected)
    return refused


@pytest.mark.parametrize("fault", ["deleted", "emptied", "truncated", "another shard's"])
def test_lost_or_swapped_files_are_refused(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    encoding_name: str,
    fault: str,
) -> None:
    """In zarr every array has a file of its own: each of them is damaged in turn."""
    records = write_artifact(tmp_path / "a", make_layout(format_name, encoding_name))
    paths = _files(tmp_path / "a", VICTIM)
    assert len(paths) == (1 if format_name == "webdataset" else 5)
    for number, path in enumerate(paths):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(tmp_path / "a", copy)
        victim = copy / path.relative_to(tmp_path / "a")
        data = victim.read_bytes()
        if fault == "deleted":
            victim.unlink()
        elif fault == "another shard's":
            shutil.copyfile(_files(copy, 0)[number], victim)
        else:
            victim.write_bytes(b"" if fault == "emptied" else data[: len(data) // 2])
        refused = _read_all(copy, records, same_record)
        assert set(refused) <= {"k3", "k4", "k5"}
        if fault == "truncated":
            assert "k5" in refused  # a tar's first half may hold its first record
        else:
            assert refused == ["k3", "k4", "k5"]


def test_one_flipped_bit_makes_only_its_record_unreadable(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    encoding_name: str,
) -> None:
    """In a tar, a flip in the first, middle or last byte of an array makes its record unreadable, and no other."""
    layout = make_layout("webdataset", encoding_name)
    records = write_artifact(tmp_path / "a", layout)
    path = tmp_path / "a" / "shards" / "00001.tar"
    whole = path.read_bytes()
    for entry in open_artifact(tmp_path / "a").commit(VICTIM).records:
        assert entry.offsets is not None
        for spec in layout.arrays:
            for position in (0, spec.nbytes // 2, spec.nbytes - 1):
                damaged = bytearray(whole)
                damaged[entry.offsets[spec.name] + position] ^= 0x10
                path.write_bytes(bytes(damaged))
                assert _read_all(tmp_path / "a", records, same_record) == [entry.key]


@pytest.mark.parametrize("place", [0.0, 0.1, 0.35, 0.5, 0.65, 0.9, 1.0])
def test_one_flipped_byte_in_a_zarr_shard_is_noticed(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    encoding_name: str,
    place: float,
) -> None:
    """Every byte of a shard is either an inner chunk's or the index's, and both carry checksums."""
    records = write_artifact(tmp_path / "a", make_layout("zarr", encoding_name))
    for path in _files(tmp_path / "a", VICTIM):
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[round(place * (len(whole) - 1))] ^= 0x10
        path.write_bytes(bytes(damaged))
        refused = _read_all(tmp_path / "a", records, same_record)
        assert refused
        assert set(refused) <= {"k3", "k4", "k5"}
        path.write_bytes(whole)
    assert _read_all(tmp_path / "a", records, same_record) == []


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def written(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
) -> tuple[Path, list[Record]]:
    folder = tmp_path_factory.mktemp("artifact") / "a"
    return folder, write_artifact(folder, make_layout(request.param))


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_damage_never_gives_wrong_values(
    written: tuple[Path, list[Record]], same_record: Same, data: st.DataObject
) -> None:
    folder, records = written
    path = data.draw(st.sampled_from(_files(folder, VICTIM)))
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(whole) - 1))
        damaged[start : start + 8] = data.draw(st.binary(min_size=0, max_size=8))
    try:
        path.write_bytes(bytes(damaged))
        assert set(_read_all(folder, records, same_record)) <= {"k3", "k4", "k5"}
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("field", ["count", "label", "info", "samples", "offsets"])
def test_a_changed_sidecar_is_noticed(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, field: str
) -> None:
    """The mean is sum / count: a sidecar with another count would give wrong values from intact arrays."""
    write_artifact(tmp_path / "a", make_layout(format_name))
    path = tmp_path / "a" / "commits" / "00001.json"
    document = json.loads(path.read_text())
    changes = {"count": 3, "label": 9, "info": {"x": 1.0}, "samples": ["other"], "offsets": {"sum": 0}}
    assert document["records"][2][field] != changes[field]
    document["records"][2][field] = changes[field]
    path.write_text(json.dumps(document))
    with refused(CorruptShard, None, path):
        open_artifact(tmp_path / "a")[5]
    assert open_artifact(tmp_path / "a")[0].key == "k0"


@pytest.mark.parametrize("fault", ["deleted", "emptied", "truncated", "another shard's"])
def test_lost_or_swapped_sidecars_are_refused(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, fault: str
) -> None:
    write_artifact(tmp_path / "a", make_layout(format_name))
    path = tmp_path / "a" / "commits" / "00001.json"
    data = path.read_bytes()
    if fault == "deleted":
        path.unlink()
    else:
        other = (tmp_path / "a" / "commits" / "00000.json").read_bytes()
        path.write_bytes({"emptied": b"", "truncated": data[: len(data) // 2]}.get(fault, other))
    with refused(CorruptShard, None, path):
        open_artifact(tmp_path / "a")[4]


def test_a_changed_head_is_noticed(tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write) -> None:
    import numpy as np
    from safetensors.numpy import save

    data = save({"weight": np.ones((2, 6), np.float32)})
    write_artifact(tmp_path / "a", make_layout(), (), {"head.safetensors": data})
    path = tmp_path / "a" / "head.safetensors"
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with refused(CorruptShard, None, path):
        open_artifact(tmp_path / "a").head()
    path.unlink()
    with refused(CorruptShard, None, path):
        open_artifact(tmp_path / "a").head()


@pytest.mark.parametrize("name", ["zarr.json", "sum/zarr.json"])
@pytest.mark.parametrize("fault", ["deleted", "emptied", "garbage"])
def test_broken_store_metadata_changes_no_value(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, name: str, fault: str
) -> None:
    """The manifest says what zarr.json says, so records are read without it."""
    write_artifact(tmp_path / "a", make_layout("zarr"))
    expected = open_artifact(tmp_path / "a")[0].mean
    path = tmp_path / "a" / "groups.zarr" / name
    if fault == "deleted":
        path.unlink()
    else:
        path.write_bytes(b"" if fault == "emptied" else b'{"zarr_format": 3, "node_type": "chair"}')
    np.testing.assert_array_equal(open_artifact(tmp_path / "a")[0].mean, expected)


def test_verify_can_be_switched_off(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    """With `verify="off"` a flipped payload byte is served."""
    write_artifact(tmp_path / "a", make_layout("webdataset"))
    path = tmp_path / "a" / "shards" / "00000.tar"
    offsets = open_artifact(tmp_path / "a").commit(0).records[0].offsets
    assert offsets is not None
    data = bytearray(path.read_bytes())
    data[offsets["sum"]] ^= 1
    path.write_bytes(bytes(data))
    artifact: Artifact = open_artifact(tmp_path / "a", verify="off")
    assert artifact[0].key == "k0"
    with refused(CorruptShard, None, tmp_path / "a", "k0: ", "sum", "crc32c"):
        open_artifact(tmp_path / "a")[0]
