"""A writer that dies at any moment leaves whole shards only, and the same command finishes the work."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import ArtifactWriter, Layout, Location, NotAnArtifact, Record, open_artifact
from storage_schemas.schema.provenance import plan_sha256
from tests.support.refusals import refused

Shards = Callable[..., list[list[Record]]]
Same = Callable[[Record, Record], None]


class Full:
    """Raises ENOSPC at one call of the function it wraps, before or after doing the work."""

    def __init__(self, function: Callable[..., Any], fatal: int, after: bool = False) -> None:
        self.function, self.fatal, self.after, self.calls = function, fatal, after, 0

    def __call__(self, *arguments: Any) -> Any:
        call, self.calls = self.calls, self.calls + 1
        if call == self.fatal and not self.after:
            raise OSError(errno.ENOSPC, "No space left on device")
        result = self.function(*arguments)
        if call == self.fatal:
            raise OSError(errno.ENOSPC, "No space left on device")
        return result


def _run(folder: Path, layout: Layout, shards: list[list[Record]], provenance: dict[str, Any]) -> None:
    """Do what a merge does: claim the folder, commit the missing shards, finish."""
    writer = ArtifactWriter(Location(folder), layout, provenance)
    writer.begin({"head.safetensors": b"head"})
    for shard in sorted(set(range(layout.shards)) - writer.committed()):
        writer.commit(shard, shards[shard], [])
    writer.finish({"README.md": b"card"})


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _check_partial(folder: Path, shards: list[list[Record]], same_record: Same) -> None:
    """Check that the unfinished artifact serves whole shards with the right values."""
    try:
        artifact = open_artifact(folder, partial=True)
    except NotAnArtifact:
        assert not (folder / "manifest.json").exists()
        return
    for position, entry in enumerate(artifact.manifest.shards):
        assert entry.groups == len(shards[entry.shard])
        for offset, expected in enumerate(shards[entry.shard]):
            same_record(artifact.read(position, offset), expected)
    # A sidecar that exists can be trusted too: finish() lists it and its records read back.
    if (folder / "commits").exists():
        writer = ArtifactWriter(Location(folder), artifact.manifest.layout, artifact.manifest.provenance)
        committed = writer.committed()
        listed = writer.finish().shards
        assert {entry.shard for entry in listed} == committed
        rebuilt = open_artifact(folder, partial=True)
        assert [record.key for record in rebuilt] == [r.key for s in sorted(committed) for r in shards[s]]


@pytest.mark.parametrize("where", ["fsync", "write before", "write after"])
def test_a_full_disk_at_any_moment_costs_at_most_the_shard(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_layout: Callable[..., Layout],
    make_shards: Shards,
    same_record: Same,
    provenance: dict[str, Any],
    format_name: str,
    where: str,
) -> None:
    layout = make_layout(format_name, extras=(), groups=4)
    shards = make_shards(layout)
    _run(tmp_path / "golden", layout, shards, provenance)
    golden = _tree(tmp_path / "golden")
    fatal, finished = 0, False
    while not finished:
        folder = tmp_path / f"at{fatal}"
        with monkeypatch.context() as patch:
            if where == "fsync":
                full = Full(os.fsync, fatal)
                patch.setattr(os, "fsync", full)
            else:
                original = Location.write
                full = Full(original, fatal, after=where == "write after")
                patch.setattr(Location, "write", lambda *arguments, full=full: full(*arguments))
            try:
                _run(folder, layout, shards, provenance)
                finished = True
            except OSError as error:
                assert error.errno == errno.ENOSPC
                finished = False
        if not finished:
            _check_partial(folder, shards, same_record)
            _run(folder, layout, shards, provenance)
        assert _tree(folder) == golden, f"call {fatal}"
        fatal += 1
    assert full.calls == fatal - 1
    assert fatal > 8


def test_a_shard_without_sidecar_is_not_committed(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_shards: Shards,
    same_record: Same,
    provenance: dict[str, Any],
    format_name: str,
) -> None:
    layout = make_layout(format_name)
    shards = make_shards(layout)
    _run(tmp_path, layout, shards, provenance)
    (tmp_path / "commits" / "00001.json").unlink()
    writer = ArtifactWriter(Location(tmp_path), layout, provenance)
    assert writer.committed() == {0, 2}
    assert not writer.finish().complete
    with refused(NotAnArtifact, None, tmp_path, "2 of 3"):
        open_artifact(tmp_path)
    artifact = open_artifact(tmp_path, partial=True)
    assert len(artifact) == 4
    for found, expected in zip(artifact, shards[0] + shards[2], strict=True):
        same_record(found, expected)


def test_leftovers_of_killed_writers_are_ignored_and_removed_at_the_end(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_shards: Shards,
    provenance: dict[str, Any],
    format_name: str,
) -> None:
    layout = make_layout(format_name)
    shards = make_shards(layout)
    _run(tmp_path / "clean", layout, shards, provenance)
    folder = tmp_path / "a"
    writer = ArtifactWriter(Location(folder), layout, provenance)
    writer.begin({"head.safetensors": b"head"})
    writer.commit(0, shards[0], [])
    leftovers = [".manifest.json.abc.tmp", "commits/.00001.json.x1.tmp", "commits/00002.json.part"]
    leftovers.append("shards/.00001.tar.y.tmp" if format_name == "webdataset" else "groups.zarr/sum/.1.z.tmp")
    for name in leftovers:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"half a fi")
    assert writer.committed() == {0}
    assert [entry.shard for entry in writer.finish().shards] == [0]
    assert len(list(open_artifact(folder, partial=True))) == 3
    _run(folder, layout, shards, provenance)
    (folder / "commits" / "00002.json.part").unlink()  # a foreign file, which is never removed
    assert _tree(folder) == _tree(tmp_path / "clean")


def test_a_second_begin_changes_nothing(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_shards: Shards,
    provenance: dict[str, Any],
    format_name: str,
) -> None:
    layout = make_layout(format_name)
    _run(tmp_path, layout, make_shards(layout), provenance)
    before = _tree(tmp_path)
    ArtifactWriter(Location(tmp_path), layout, provenance).begin({"head.safetensors": b"another"})
    assert _tree(tmp_path) == before


def test_a_folder_with_other_things_is_refused(
    tmp_path: Path, make_layout: Callable[..., Layout], provenance: dict[str, Any], format_name: str
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with refused(NotAnArtifact, None, tmp_path, "'thesis.tex'"):
        ArtifactWriter(Location(tmp_path), make_layout(format_name), provenance).begin({})
    assert _tree(tmp_path) == {"thesis.tex": b"precious"}


@pytest.mark.parametrize("name", ["groups.zarr/zarr.json", "head.safetensors"])
def test_somebody_elses_file_under_our_name_is_not_overwritten(
    tmp_path: Path, make_layout: Callable[..., Layout], provenance: dict[str, Any], name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with refused(NotAnArtifact, None, tmp_path, f"'{name}'"):
        ArtifactWriter(Location(tmp_path), make_layout("zarr"), provenance).begin({"head.safetensors": b"head"})
    assert _tree(tmp_path) == {name: b"precious"}


@pytest.mark.parametrize(
    ("change", "facts"),
    [
        ({"seed": 8}, ("seed: ", " 7 ", " 8 ")),
        ({"attack": {"epsilon": "2/255"}}, ("attack.epsilon: ", " None ", "'2/255'")),
        ({"source": {"url": "photos/", "fingerprint": "bad"}}, ("source.fingerprint: ", "'f00'", "'bad'")),
    ],
)
def test_an_artifact_of_another_plan_is_refused_with_the_difference(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    provenance: dict[str, Any],
    change: dict[str, Any],
    facts: tuple[str, ...],
) -> None:
    ArtifactWriter(Location(tmp_path), make_layout(), provenance).begin({})
    before = _tree(tmp_path)
    with refused(NotAnArtifact, None, tmp_path, *facts):
        ArtifactWriter(Location(tmp_path), make_layout(), {**provenance, **change}).begin({})
    with refused(NotAnArtifact, None, "layout.format: ", "'zarr'", "'webdataset'"):
        ArtifactWriter(Location(tmp_path), make_layout("webdataset"), provenance).begin({})
    with refused(NotAnArtifact, None, "layout.groups: ", " 7 ", " 8 "):
        ArtifactWriter(Location(tmp_path), make_layout(groups=8), provenance).begin({})
    assert _tree(tmp_path) == before


def test_the_plan_hash_ignores_locations(make_layout: Callable[..., Layout]) -> None:
    layout = make_layout()

    def plan(source: str, spec: str, sha256: str, **more: Any) -> str:
        tree = {"source": {"url": source}, "encoder": [{"spec": spec}, {"sha256": sha256}]}
        return plan_sha256(layout, {**tree, "encoder": {"spec": spec, "sha256": sha256}, **more})

    base = plan("/data", "mlp:1x4x4-2@a.pt", "00")
    assert plan("s3://bucket", "mlp:1x4x4-2@b.pt", "00") == base
    assert plan("/data", "mlp:1x4x4-2@a.pt", "01") != base
    assert plan("/data", "mlp:1x4x4-2@a.pt", "00", seed=1) != base
    assert plan_sha256(make_layout(groups=8), {}) != plan_sha256(layout, {})


def test_an_artifact_of_a_moved_source_is_resumed(tmp_path: Path, make_layout: Callable[..., Layout]) -> None:
    for url in ("/old", "/new"):
        ArtifactWriter(Location(tmp_path), make_layout(), {"source": {"url": url, "n": 1}}).begin({})
    assert json.loads((tmp_path / "manifest.json").read_text())["provenance"]["source"]["url"] == "/old"


@pytest.mark.parametrize("fault", ["nan", "inf", "dtype", "shape", "missing"])
def test_a_record_that_breaks_the_layout_is_refused_before_anything_is_written(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_record: Callable[..., Record],
    provenance: dict[str, Any],
    format_name: str,
    fault: str,
) -> None:
    layout = make_layout(format_name)
    writer = ArtifactWriter(Location(tmp_path), layout, provenance)
    writer.begin({})
    before = _tree(tmp_path)
    record = make_record(0, layout)
    arrays = dict(record.arrays)
    target = np.asarray(arrays["target"], np.float32)
    if fault == "missing":
        del arrays["target"]
    else:
        wrong = {"nan": np.nan * target, "inf": np.inf * np.abs(target), "dtype": target.astype("f8")}
        arrays["target"] = wrong.get(fault, target[:-1])
    bad = Record(record.key, record.count, record.encoding, arrays)
    with pytest.raises(ValueError, match=r"group k0: .*target"):
        writer.commit(0, [bad], [])
    assert _tree(tmp_path) == before
