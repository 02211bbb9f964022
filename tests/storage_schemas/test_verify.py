"""The corruption matrix: every file of an artifact, damaged in every way.

`verify` notices each of them and names the file; a reader returns the values that were written or an error.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from datamerge.tools.inspection import verify as verify_command
from storage_schemas import (
    ArtifactWriter,
    CorruptShard,
    DatamergeError,
    Layout,
    Location,
    NotAnArtifact,
    Record,
    SchemaError,
    UnknownVersion,
    open_artifact,
)
from storage_schemas.verify import Report, fix, verify
from tests.support.refusals import refused

Same = Callable[[Record, Record], None]
Shards = Callable[..., list[list[Record]]]

HEAD = save({"weight": np.arange(12, dtype=np.float32).reshape(2, 6)}, metadata={"names": '["a", "b"]'})
EXTRA = {"README.md": b"# Merged groups\n", "preview.png": b"\x89PNG" + bytes(range(200)), "croissant.json": b"{}\n"}
FLIPS = {"first byte": 0.0, "header": 0.07, "payload": 0.5, "index": 0.93, "last byte": 1.0}


def merge(folder: Path, layout: Layout, shards: list[list[Record]], provenance: dict[str, Any]) -> list[int]:
    """Do what `datamerge merge` does; return the shards that were missing."""
    writer = ArtifactWriter(Location(folder), layout, provenance)
    writer.begin({"head.safetensors": HEAD})
    missing = sorted(set(range(layout.shards)) - writer.committed())
    for shard in missing:
        writer.commit(shard, shards[shard], [])
    writer.finish()
    writer.finish(EXTRA)
    return missing


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Case:
    """An artifact to damage and the records it was made of; `other` is another artifact of the same kind."""

    def __init__(self, folder: Path, format: str, make_layout: Any, make_shards: Shards, provenance: Any) -> None:
        self.layout: Layout = make_layout(format, extras=("target",))
        self.shards = make_shards(self.layout)
        self.records = [record for shard in self.shards for record in shard]
        self.provenance = provenance
        self.folder = folder / "a"
        self.merge()
        self.files = tree(self.folder)
        # Different records, and one more, so that no file is the same.
        layout = make_layout(format, extras=("target",), groups=8)
        records = [record for shard in make_shards(layout) for record in shard][::-1]
        merge(folder / "other", layout, [records[i : i + 3] for i in (0, 3, 6)], {**provenance, "seed": 8})
        self.other = tree(folder / "other")

    def merge(self) -> list[int]:
        return merge(self.folder, self.layout, self.shards, self.provenance)

    def restore(self) -> None:
        shutil.rmtree(self.folder)
        for path, data in self.files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_bytes(data)


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def built(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    make_layout: Callable[..., Layout],
    make_shards: Shards,
    provenance: dict[str, Any],
) -> Case:
    return Case(tmp_path_factory.mktemp("matrix"), request.param, make_layout, make_shards, provenance)


@pytest.fixture
def case(built: Case) -> Iterator[Case]:
    yield built
    built.restore()


def _boundaries(path: str, data: bytes) -> list[int]:
    """Where a file can be cut without its format showing it: between tar members, chunks, lines."""
    if path.endswith(".tar"):
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            return [member.offset for member in tar.getmembers()]
    if path.endswith((".json", ".md")):
        return [index + 1 for index, byte in enumerate(data) if byte == 10][:-1]
    return [len(data) - 52, len(data) // 3]


def _faults(case: Case, path: str) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(name, changed files) of every fault; None is a file that is deleted."""
    data = case.files[path]
    yield "deleted", {path: None}
    yield "emptied", {path: b""}
    yield "cut in half", {path: data[: len(data) // 2]}
    boundaries = [cut for cut in _boundaries(path, data) if 0 < cut < len(data)]
    for cut in boundaries[:: max(1, len(boundaries) // 3)]:
        yield f"cut at {cut}", {path: data[:cut]}
    for name, place in FLIPS.items():
        flipped = bytearray(data)
        flipped[round(place * (len(data) - 1))] ^= 0x04
        yield f"bit flipped in the {name}", {path: bytes(flipped)}
    if case.other.get(path, data) != data:
        yield "replaced by another artifact's", {path: case.other[path]}
    yield "twice over", {path: data + data}
    yield "duplicated", {f"{path} (copy)": data}
    if path.startswith(("shards/", "commits/")):
        yield "duplicated as another shard", {path.replace("0000", "0009"): data}


def _apply(case: Case, changes: dict[str, bytes | None]) -> None:
    for path, data in changes.items():
        if data is None:
            (case.folder / path).unlink()
        else:
            (case.folder / path).write_bytes(data)


def _undo(case: Case, changes: dict[str, bytes | None]) -> None:
    for path in changes:
        if path in case.files:
            (case.folder / path).write_bytes(case.files[path])
        else:
            (case.folder / path).unlink()


def _check_reader(case: Case, same_record: Same) -> None:
    """Check that reading gives right values or an error, in both modes that verify."""
    for mode in ("record", "shard"):
        try:
            artifact = open_artifact(case.folder, verify=mode)
        except DatamergeError:
            continue
        for index in range(len(artifact)):
            try:
                found = artifact[index]
            except DatamergeError:
                continue
            same_record(found, case.records[index])
        try:
            head = artifact.head()
        except DatamergeError:
            continue
        assert head is not None
        np.testing.assert_array_equal(head[0]["weight"], np.arange(12).reshape(2, 6))


def test_every_fault_in_every_file_is_noticed(case: Case, same_record: Same) -> None:
    assert verify(Location(case.folder)).problems == []
    number = 0
    for path in case.files:
        for fault, changes in _faults(case, path):
            _apply(case, changes)
            report = verify(Location(case.folder))
            assert next(iter(changes)) in {problem.file for problem in report.problems}, f"{path} {fault}"
            assert all("\n" not in str(problem) for problem in report.problems)
            _check_reader(case, same_record)
            _undo(case, changes)
            number += 1
    assert verify(Location(case.folder)).problems == []
    assert number > 10 * len(case.files)


def _damage(case: Case, path: str) -> None:
    data = bytearray(case.files[path])
    data[len(data) // 2] ^= 0x20
    (case.folder / path).write_bytes(bytes(data))


def _shard_file(case: Case, shard: int) -> str:
    return f"shards/{shard:05d}.tar" if case.layout.format == "webdataset" else f"groups.zarr/sum/c/{shard}/0/0/0"


def _fix(case: Case) -> Report:
    report = verify(Location(case.folder))
    fix(Location(case.folder), report)
    return report


@pytest.mark.parametrize("kind", ["shard file", "sidecar", "missing sidecar"])
def test_fix_removes_exactly_the_bad_shards_and_the_merge_rewrites_them(case: Case, kind: str) -> None:
    for shard in (0, 2):
        _damage(case, _shard_file(case, shard) if kind == "shard file" else f"commits/{shard:05d}.json")
        if kind == "missing sidecar":
            (case.folder / f"commits/{shard:05d}.json").unlink()
    before = tree(case.folder)
    report = _fix(case)
    assert {problem.shard for problem in report.problems} == {0, 2}
    after = tree(case.folder)
    sidecars = {"commits/00000.json", "commits/00002.json"}
    assert set(report.removed) == (set() if kind == "missing sidecar" else sidecars)
    assert set(before) - set(after) == set(report.removed)
    assert {path for path in after if after[path] != before[path]} == {"manifest.json"}
    with refused(NotAnArtifact, None, case.folder, "1 of 3"):
        open_artifact(case.folder)
    assert [record.key for record in open_artifact(case.folder, partial=True)] == ["k3", "k4", "k5"]
    again = verify(Location(case.folder))
    assert (again.problems, again.complete, again.shards) == ([], False, 1)
    assert case.merge() == [0, 2]
    assert tree(case.folder) == case.files


@pytest.mark.parametrize(
    "path",
    ["manifest.json", "head.safetensors", "README.md", "preview.png", "groups.zarr/zarr.json", "other manifest"],
)
@pytest.mark.parametrize("fault", ["flipped", "deleted"])
def test_after_fix_the_merge_restores_files_outside_shards(case: Case, path: str, fault: str) -> None:
    if path == "other manifest":
        path = "manifest.json"
        (case.folder / path).write_bytes(case.other[path])
    elif path not in case.files:
        pytest.skip("a WebDataset artifact has no such file")
    elif fault == "flipped":
        _damage(case, path)
    else:
        (case.folder / path).unlink()
    report = _fix(case)
    assert [problem.file for problem in report.problems] == [path]
    with pytest.raises(NotAnArtifact):
        open_artifact(case.folder)
    assert case.merge() == []
    assert tree(case.folder) == case.files


def test_damaged_records_are_named(case: Case) -> None:
    """Of a damaged file, exactly the records that cannot be read."""
    path = _shard_file(case, 1)
    data = bytearray(case.files[path])
    if case.layout.format == "webdataset":
        offsets = open_artifact(case.folder).commit(1).records[1].offsets
        assert offsets is not None
        data[offsets["scatter"] + 5] ^= 1
    else:  # three inner chunks of about the same size, then the index
        data[(len(data) - 52) // 2] ^= 1
    (case.folder / path).write_bytes(bytes(data))
    problems = verify(Location(case.folder)).problems
    assert [(problem.file, problem.shard, problem.record) for problem in problems] == [
        (path, 1, None),
        (path, 1, "k4"),
    ]
    assert "sha256" in problems[0].cause
    assert "crc32c" in problems[1].cause


def test_damage_outside_arrays_is_reported_as_such(case: Case) -> None:
    path = "shards/00001.tar" if case.layout.format == "webdataset" else "groups.zarr/count/c/1"
    data = bytearray(case.files[path])
    data[-1] ^= 1
    (case.folder / path).write_bytes(bytes(data))
    (problem,) = verify(Location(case.folder)).problems
    assert (problem.file, problem.shard, problem.record) == (path, 1, None)
    assert "arrays" in problem.cause
    assert open_artifact(case.folder)[3].key == "k3"
    with refused(CorruptShard, None, case.folder / path, "sha256"):
        open_artifact(case.folder, verify="shard")[3]
    assert open_artifact(case.folder, verify="shard")[0].key == "k0"


def test_an_unfinished_artifact_is_sound(case: Case) -> None:
    """A writer was killed before it wrote a sidecar: the next merge writes the shard again."""
    (case.folder / "commits/00001.json").unlink()
    ArtifactWriter(Location(case.folder), case.layout, case.provenance).finish()
    report = verify(Location(case.folder))
    assert (report.problems, report.complete, report.shards, report.groups) == ([], False, 2, 4)
    # A commit that no manifest lists yet is checked as well.
    (case.folder / "commits/00001.json").write_bytes(case.files["commits/00001.json"])
    _damage(case, _shard_file(case, 1))
    assert {problem.shard for problem in verify(Location(case.folder)).problems} == {1}


def test_a_damaged_sidecar_is_never_listed_in_the_manifest(case: Case) -> None:
    """A second merge over a damaged artifact must not make the damage official."""
    _damage(case, "commits/00001.json")
    with refused(SchemaError, None, case.folder / "commits/00001.json"):
        case.merge()
    (case.folder / "commits/00001.json").write_bytes(case.files["commits/00002.json"])
    with refused(CorruptShard, None, case.folder / "commits/00001.json", "shard 1", "shard 2", "`fix=True`"):
        case.merge()
    assert (case.folder / "manifest.json").read_bytes() == case.files["manifest.json"]


def test_the_verify_command(case: Case) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        result = CliRunner().invoke(verify_command, [str(case.folder), *arguments])
        return result.exit_code, result.stdout

    code, output = run()
    assert (code, len(output.splitlines())) == (0, 1)
    assert all(fact in output for fact in ("sound", " 7 groups", " 3 shards"))
    _damage(case, "README.md")
    (case.folder / _shard_file(case, 1)).write_bytes(b"")
    code, output = run("--json")
    facts = json.loads(output)
    assert (code, facts["sound"], facts["groups"], facts["removed"]) == (1, False, 7, [])
    named = {(problem["file"], problem["record"]) for problem in facts["problems"]}
    assert {("README.md", None), *((_shard_file(case, 1), key) for key in ("k3", "k4", "k5"))} <= named
    code, output = run("--fix")
    assert code == 1
    assert "commits/00001.json" in output
    assert not (case.folder / "commits/00001.json").exists()
    assert case.merge() == [1]
    assert run()[0] == 0


def test_progress_is_reported(case: Case) -> None:
    seen: list[tuple[int, int]] = []
    verify(Location(case.folder), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_artifacts_in_object_stores_are_verified_and_fixed(case: Case) -> None:
    """fsspec's memory store stands in for them: no folders, no modes, no renames."""
    files = fsspec.filesystem("memory")
    location = Location("memory://verify-tests/a")
    for path, data in case.files.items():
        location.write(path, data)
    try:
        assert verify(location).problems == []
        location.write(_shard_file(case, 1), b"short")
        location.write("notes.txt", b"")
        report = verify(location)
        fix(location, report)
        assert {problem.file for problem in report.problems} == {_shard_file(case, 1), "notes.txt"}
        assert report.removed == ["commits/00001.json"]
        assert {problem.file for problem in verify(location).problems} == {"notes.txt"}
        assert len(open_artifact(location.url, partial=True)) == 4
    finally:
        files.rm("/verify-tests", recursive=True)


def test_places_without_an_artifact_are_refused(tmp_path: Path) -> None:
    with refused(NotAnArtifact, None, tmp_path, "manifest.json"):
        verify(Location(tmp_path))
    (tmp_path / "manifest.json").write_text('{"schema_version": 2, "writer": "datamerge 3.0"}')
    with refused(UnknownVersion, None, "schema_version 2", "datamerge 3.0"):
        verify(Location(tmp_path))


def test_a_manifest_without_sidecars_loses_every_shard(case: Case) -> None:
    shutil.rmtree(case.folder / "commits")
    report = _fix(case)
    assert {problem.shard for problem in report.problems} >= {0, 1, 2}
    assert case.merge() == [0, 1, 2]
    assert tree(case.folder) == case.files


def test_a_folder_in_place_of_a_sidecar_is_damage(case: Case) -> None:
    path = case.folder / "commits/00001.json"
    path.unlink()
    path.mkdir()
    try:
        report = verify(Location(case.folder))
        assert any("commits/00001.json" in str(problem) for problem in report.problems)
        artifact = open_artifact(case.folder)
        with refused(CorruptShard, None, path):
            artifact[artifact.shard_sizes[0]]
    finally:
        path.rmdir()
