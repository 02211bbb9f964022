"""Faults on a real cluster: the artifact ends with the bytes of a merge without faults."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage_schemas import open_artifact
from tests.support.bench import GROUPS, SHARDS, STORE_BYTES, Bench, tree, wait_for

# Ray's own start-up leaves file handles and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

Tree = dict[str, bytes]


def _busy_workers(bench: Bench, driver: subprocess.Popen[str]) -> list[int]:
    """Processes that have used the encoder, without the driver."""
    return [int(path.name) for path in (bench.faults / "busy").iterdir() if int(path.name) != driver.pid]


def test_an_undisturbed_merge_holds_every_usable_photo_once(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    """Every usable photo has one group, the others are rejected with a reason, and the manifest agrees."""
    for path, data in undisturbed.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
    artifact = open_artifact(tmp_path)
    assert len(artifact) == GROUPS
    assert len(artifact.manifest.shards) == SHARDS
    names = [record.samples[0] for record in artifact]
    assert sorted(names) == sorted(f"{index:02d}.png" for index in range(14) if index != 5)
    rejects = {
        reject.sample: reject.reason
        for position in range(len(artifact.shard_sizes))
        for reject in artifact.commit(position).rejects
    }
    assert rejects.keys() == {"03-corrupt.jpg", "05.png", "06-cut.png", "09-large.png"}
    assert "not an image" in rejects["03-corrupt.jpg"]
    assert rejects["05.png"] == "non-finite gradient"
    assert rejects["09-large.png"] == "expected 8x8 pixels, found 8x9"
    assert sum(shard.rejected for shard in artifact.manifest.shards) == 4


def test_a_killed_worker_does_not_change_the_artifact(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    bench.switch("slow")
    process = bench.start(tmp_path / "a")
    victim = wait_for(lambda: _busy_workers(bench, process))[0]
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "a") == undisturbed


def test_sigterm_keeps_finished_shards_and_the_same_command_resumes(
    bench: Bench, undisturbed: Tree, tmp_path: Path
) -> None:
    bench.switch("slow")
    process = bench.start(tmp_path / "a")
    wait_for(lambda: _busy_workers(bench, process))
    process.terminate()
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert errors.splitlines()[-1].startswith("terminated: finished shards are kept")
    bench.switch()
    code, errors = bench.merge(tmp_path / "a")
    assert code == 0, errors
    assert tree(tmp_path / "a") == undisturbed


def test_a_lost_and_replaced_node_does_not_change_the_artifact(
    bench: Bench, undisturbed: Tree, tmp_path: Path
) -> None:
    bench.switch("slow")
    process = bench.start(tmp_path / "a")
    wait_for(lambda: len(_busy_workers(bench, process)) == 2)
    (node,) = bench.cluster.worker_nodes
    bench.cluster.remove_node(node, allow_graceful=False)
    bench.cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert tree(tmp_path / "a") == undisturbed


def test_a_merge_resumes_after_its_driver_was_killed(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    bench.switch("slow")
    process = bench.start(tmp_path / "a")
    commits = tmp_path / "a" / "commits"
    wait_for(lambda: commits.is_dir() and len(list(commits.glob("*.json"))) >= 2)
    process.kill()
    process.communicate()
    done = {path.name: path.stat().st_mtime_ns for path in commits.glob("*.json")}
    assert not json.loads((tmp_path / "a" / "manifest.json").read_bytes())["complete"]
    bench.switch()
    code, errors = bench.merge(tmp_path / "a")
    assert code == 0, errors
    assert tree(tmp_path / "a") == undisturbed
    # Finished shards were not done again.
    assert {name: (commits / name).stat().st_mtime_ns for name in done} == done
    code, errors = bench.merge(tmp_path / "a")
    assert code == 0, errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_merge_stopped_by_a_full_disk_resumes_with_more_space(
    bench: Bench, undisturbed: Tree, small_disk: Path
) -> None:
    bench.switch()
    code, errors = bench.merge(small_disk / "a")
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert "disk" in last, errors
    assert "Traceback" not in errors
    # Commits on the disk are complete.
    for path, data in tree(small_disk / "a").items():
        if path.startswith("commits/"):
            assert undisturbed[path] == data
    subprocess.run(["mount", "-o", "remount,size=10m", str(small_disk)], check=True)
    code, errors = bench.merge(small_disk / "a")
    assert code == 0, errors
    assert tree(small_disk / "a") == undisturbed


def test_a_shard_that_kills_its_workers_is_given_up(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    """One photo kills every worker. The other shards finish, and once the photo is harmless a merge completes."""
    bench.switch("poison")
    code, errors = bench.merge(tmp_path / "a")
    assert code == 1
    last = errors.strip().splitlines()[-1]
    assert {"1", "9", "08.png", "3"} <= set(re.findall(r"[\w.]+", last)), errors
    assert "Traceback" not in errors
    poisoned = next(path for path in undisturbed if path.startswith("commits/") and b"08.png" in undisturbed[path])
    found = tree(tmp_path / "a")
    assert found.keys() >= {path for path in undisturbed if path.startswith("commits/")} - {poisoned}
    assert poisoned not in found
    manifest = json.loads(found["manifest.json"])
    assert not manifest["complete"]
    assert len(manifest["shards"]) == SHARDS - 1
    bench.switch()
    code, errors = bench.merge(tmp_path / "a")
    assert code == 0, errors
    assert tree(tmp_path / "a") == undisturbed


def test_a_lost_object_does_not_count_as_a_failure(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    """The shard that needed the object is done again, which does not count as one of its failures."""
    bench.switch("lost")
    code, errors = bench.merge(tmp_path / "a", "--max-workers", "1")
    assert code == 0, errors
    assert not (bench.faults / "lost").exists()
    assert tree(tmp_path / "a") == undisturbed


def test_too_many_rejects_stop_the_merge(bench: Bench, undisturbed: Tree, tmp_path: Path) -> None:
    """Rejects of earlier runs count too; with a higher limit the merge finishes."""
    bench.switch()
    for _ in range(2):
        code, errors = bench.merge(tmp_path / "a", "--max-rejected", "3")
        assert code == 1
        assert {"4", "3"} <= set(errors.strip().splitlines()[-1].split()), errors
    code, errors = bench.merge(tmp_path / "a", "--max-rejected", "4")
    assert code == 0, errors
    assert tree(tmp_path / "a") == undisturbed
