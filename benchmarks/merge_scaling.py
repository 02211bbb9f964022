"""The merge around the attack: job over attack time, one worker against two, Ray's cost of a shard, driver memory.

job        seconds of a whole job on one worker (Ray up, worker start subtracted) over the seconds of its attacks
scaling    1 worker against 2 on the same shards
overhead   seconds a shard with a no-op attack (zero steps on tiny images), for 10, 100, … shards
"""

from __future__ import annotations

import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import click
import numpy as np

from merge_service import MergeConfig, ray_stage
from merge_service.merge import Prepared, prepare, worker_setup
from merge_service.planning import ShardTask
from merge_service.work import ShardResult, ShardWorker
from storage_schemas import ArtifactWriter, Location

OVERHEAD_SHAPE = (1, 2, 2)


@click.command()
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--shards", default=8, show_default=True)
@click.option("--groups-per-shard", default=4, show_default=True)
@click.option("--members", default=4, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--most-shards", default=1000, show_default=True, help="Largest job of the overhead measurement.")
def main(encoder: str, shards: int, groups_per_shard: int, members: int, repeats: int, most_shards: int) -> None:
    """Print ratios and medians."""
    folder = Path(tempfile.mkdtemp(prefix="datamerge-benchmark-"))
    try:
        photos = _photos(folder / "photos.npz", shards * groups_per_shard, 224)
        settings = {"encoder": encoder, "groups_per_shard": groups_per_shard, "members": members, "device": "cpu"}
        rounds = [_round(photos, folder, settings) for _ in range(repeats)]
        job, attack, two = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(a / b for a, b, _ in rounds)
        scaling = statistics.median(a / c for a, _, c in rounds)
        click.echo(
            f"job {job:.2f} s, attack alone {attack:.2f} s, ratio {ratio:.3f}, {shards} shards, {repeats} rounds"
        )
        click.echo(f"2 workers {two:.2f} s, scaling {scaling:.2f}")
        count = 10
        while count <= most_shards:
            seconds = _overhead(folder, count)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            click.echo(f"{count} shards: {1000 * seconds / count:.1f} ms a shard, driver's peak {memory:.0f} MB")
            count *= 10
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _round(photos: Path, folder: Path, settings: dict[str, object]) -> tuple[float, float, float]:
    """Seconds of the job on one worker, of its attacks in this process without anything else, and on two workers."""
    one = _job(_prepared(photos, folder, settings), 1)
    alone = _attack_alone(_prepared(photos, folder, settings))
    two = _job(_prepared(photos, folder, settings), 2)
    return one, alone, two


def _prepared(photos: Path, folder: Path, settings: dict[str, object]) -> Prepared:
    artifact = folder / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    return prepare(MergeConfig.model_validate({"source": str(photos), "artifact": str(artifact), **settings}))


def _job(prepared: Prepared, workers: int) -> float:
    """Seconds from when every worker is ready until the last shard is committed.

    Each worker's first shard is not counted: it ends when the worker has started, whose cost does not grow with the
    job. The rest is scaled to all shards.
    """
    config = prepared.config.model_copy(update={"max_workers": workers})
    prepared = Prepared(**{**vars(prepared), "config": config})
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    ray_stage.start(config)
    shards = range(prepared.plan.layout.shards)
    ends = []
    for result in ray_stage.run_shards(prepared.plan, shards, worker_setup(prepared, writer, "cpu")):
        if not isinstance(result, ShardResult):
            raise SystemExit(f"shard {result.shard}: {result.reason}")
        ends.append(time.perf_counter())
    ray_stage.stop()
    return (ends[-1] - ends[workers - 1]) / (len(shards) - workers) * len(shards)


def _attack_alone(prepared: Prepared) -> float:
    """Seconds that the attacks of all shards take, one after the other, in this process."""
    writer = ArtifactWriter(Location(prepared.config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    worker.prepare()
    worker.run(ShardTask(0, prepared.plan.task(0).groups[:1]))
    return sum(worker.run(prepared.plan.task(shard)).attack_seconds for shard in range(prepared.plan.layout.shards))


def _overhead(folder: Path, count: int) -> float:
    photos = _photos(folder / f"tiny-{count}.npz", count, OVERHEAD_SHAPE[1])
    settings = {"encoder": "mlp:3x2x2-2", "groups_per_shard": 1, "members": 1, "steps": 0, "format": "webdataset"}
    return _job(_prepared(photos, folder, settings), 1)


def _photos(path: Path, count: int, size: int) -> Path:
    """Smooth random images, which compress as photos do."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, -(-size // 8), -(-size // 8), 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    np.savez(path, images=images)
    return path


if __name__ == "__main__":
    main()
