"""Writers in real processes: killed at their write calls, and two at once on one artifact."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_schemas import ArtifactWriter, Layout, Location, Record, open_artifact
from storage_schemas.verify import verify
from tests.support import writers
from tests.support.paths import SUPPORT

Same = Callable[[Record, Record], None]
Shards = Callable[..., list[list[Record]]]

PROGRAM = SUPPORT / "writers.py"


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def job(
    format_name: str, make_layout: Callable[..., Layout], make_shards: Shards, provenance: dict[str, Any]
) -> tuple[Layout, list[list[Record]], dict[str, Any]]:
    layout = make_layout(format_name, extras=(), groups=4)
    return layout, make_shards(layout), provenance


def _merge(folder: Path, job: writers.Job) -> dict[str, bytes]:
    """The same merge in this process."""
    writers.merge(folder, job)
    return _tree(folder)


def _run(kind: str, folder: Path, job: object) -> int:
    (folder / "job.pickle").write_bytes(pickle.dumps(job))
    arguments = [sys.executable, str(PROGRAM), kind, str(folder / "job.pickle"), str(folder)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    return int(done.stdout)


def test_killed_at_every_kind_of_write_call(tmp_path: Path, job: Any, same_record: Same) -> None:
    """A sound artifact of whole shards is left, and the next run completes it to what a single run writes."""
    killed = _run("kill", tmp_path, job)
    shards = job[1]
    golden = _merge(tmp_path / "golden", job)
    assert _tree(tmp_path / "whole") == golden
    seen: set[tuple[tuple[str, bytes], ...]] = set()
    for number in range(killed):
        folder = tmp_path / str(number)
        left = _tree(folder)
        visible = tuple((path, data) for path, data in left.items() if not Path(path).name.startswith("."))
        if visible in seen:  # differs from an earlier one in temporary files only
            continue
        seen.add(visible)
        if "manifest.json" in left:
            artifact = open_artifact(folder, partial=True)
            for position, entry in enumerate(artifact.manifest.shards):
                for offset, expected in enumerate(shards[entry.shard]):
                    same_record(artifact.read(position, offset), expected)
            assert verify(Location(folder)).problems == []
        for shard in ArtifactWriter(Location(folder), *job[::2]).committed():
            # Committed means every file is there, whether the manifest says so already or not.
            paths = [path for path in golden if f"/c/{shard}" in path or path == f"shards/{shard:05d}.tar"]
            assert paths
            assert all(left.get(path) == golden[path] for path in paths)
        assert _merge(folder, job) == golden
    # The files of a shard, its sidecar, the class head, three manifests and the card.
    files = len(open_artifact(tmp_path / "golden").commit(0).files) + 1 + 1 + 3 + 1
    assert killed > 6 * files
    assert len(seen) > files


def test_two_writers_at_once_make_one_artifact(tmp_path: Path, job: Any) -> None:
    """Neither fails, a reader beside them never sees a wrong value, and the bytes are those of one writer."""
    rounds = _run("race", tmp_path, job)
    golden = _merge(tmp_path / "golden", job)
    assert rounds > 0
    for number in range(rounds):
        assert _tree(tmp_path / str(number)) == golden
