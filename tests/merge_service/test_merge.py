"""Merges from Python, which start Ray themselves."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from merge_service import MergeConfig, merge
from merge_service.merge import MergeResult, prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import ArtifactWriter, Location, open_artifact
from tests.support.bench import Bench, tree


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_text("not an image")
    return folder


def _config(photos: Path, artifact: Path, workers: int) -> MergeConfig:
    return MergeConfig(
        source=str(photos),
        artifact=str(artifact),
        encoder="mlp:3x8x8-16-4",
        members=3,
        steps=2,
        groups_per_shard=3,
        max_workers=workers,
        keep_members=True,
        keep_clean=True,
    )


def _merge_in_new_process(config: MergeConfig) -> MergeResult:
    """Merge in a new process: a driver that has started a Ray loses its actors on any other cluster."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(merge, config).result()


@pytest.mark.xdist_group("ray")
def test_a_merge_that_starts_ray_writes_the_bytes_of_a_loop_over_shards(photos: Path, tmp_path: Path) -> None:
    result = _merge_in_new_process(_config(photos, tmp_path / "ray", 2))
    assert result.manifest.groups == 7
    assert [reject.sample for reject in result.rejects] == ["broken.jpg"]
    # Without Ray, last shard first, beside a temporary file of a killed writer.
    prepared = prepare(_config(photos, tmp_path / "loop", 2))
    writer = ArtifactWriter(Location(tmp_path / "loop"), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    left = tmp_path / "loop" / "groups.zarr" / "sum" / "c" / "1" / "0" / "0" / ".0.killed.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    threads = torch.get_num_threads()
    worker.prepare()
    for shard in reversed(range(prepared.plan.layout.shards)):
        worker.run(prepared.plan.task(shard))
    torch.set_num_threads(threads)
    assert merge(_config(photos, tmp_path / "loop", 2)).merged_shards == 0
    assert tree(tmp_path / "loop") == tree(tmp_path / "ray")
    for record in open_artifact(tmp_path / "ray"):
        assert record.members is not None
        assert record.clean is not None
        assert np.abs(record.members.astype(int) - record.clean.astype(int)).max() <= 2
        np.testing.assert_allclose(record.mean, record.members.mean(axis=0) / 255, atol=1e-7)
        np.testing.assert_allclose(record.variance, (record.members / 255).var(axis=0), atol=1e-9)


def test_starting_ray_again_leaves_no_more_threads(bench: Bench) -> None:
    """Native threads are counted too: those of Ray's metrics outlive ray.shutdown()."""
    counts = []
    for _ in range(4):
        ray.init(address=bench.address, logging_level=40, log_to_driver=False)
        ray.shutdown()
        counts.append(len(list(Path("/proc/self/task").iterdir())))
    assert counts[-1] <= counts[0] + 1, counts
