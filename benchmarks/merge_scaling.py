"""Overhead of merging beyond the attack: job over attack time, scaling to two workers, Ray's cost per shard, memory.

job        seconds of a whole job on one worker (Ray running, without worker start) over the seconds of its attacks
scaling    1 worker against 2 on the same shards, compared with the gain of two bare processes on this machine
overhead   seconds per shard with a no-op attack (zero steps on tiny images), for 10, 100, … shards, and the same
           shards in a loop without Ray

Artifacts go to /dev/shm if it exists, since every shard is synced four times and a disk would dominate the time.
"""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor

from datamerge.encoders import load_encoder
from merge_service import MergeConfig, ray_stage
from merge_service.merge import Prepared, prepare, worker_setup
from merge_service.planning import ShardTask
from merge_service.worker import ShardResult, ShardWorker
from storage_schemas import ArtifactWriter, Location

OVERHEAD_SHAPE = (1, 2, 2)
MEMORY = Path("/dev/shm")


@click.command()
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--shards", default=10, show_default=True)
@click.option("--groups-per-shard", default=1, show_default=True)
@click.option("--members", default=3, show_default=True)
@click.option("--steps", default=3, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--most-shards", default=10_000, show_default=True, help="Largest job of the overhead measurement.")
def main(
    encoder: str, shards: int, groups_per_shard: int, members: int, steps: int, repeats: int, most_shards: int
) -> None:
    """Print ratios and medians."""
    folder = Path(tempfile.mkdtemp(prefix="datamerge-benchmark-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        photos = make_photos(folder / "photos.npz", shards * groups_per_shard, 224)
        settings = {"encoder": encoder, "groups_per_shard": groups_per_shard, "members": members, "steps": steps}
        rounds = [measure_round(photos, folder, settings | {"device": "cpu"}, 2) for _ in range(repeats)]
        ceiling = statistics.median(bare_scaling(encoder) for _ in range(repeats))
        job, attack, two = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(one / alone for one, alone, _ in rounds)
        scaling = statistics.median(one / both for one, _, both in rounds)
        click.echo(
            f"job {job:.2f} s, attack alone {attack:.2f} s, ratio {ratio:.3f}, {shards} shards, {repeats} rounds"
        )
        click.echo(f"2 workers {two:.2f} s, scaling {scaling:.2f}; two bare processes {ceiling:.2f}")
        count = 10
        while count <= most_shards:
            found = measure_overhead(folder, count)
            driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            click.echo(
                f"{count} shards: {1000 * found.shard:.1f} ms a shard ({1000 * found.in_loop:.1f} in a loop), "
                f"manifest {found.manifest:.2f} s, peak of the driver {driver:.0f} MB, "
                f"of a worker {found.peak:.0f} MB"
            )
            sys.stdout.flush()
            count *= 10
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class Overhead:
    """Cost of a job without an attack.

    Attributes:
        shard, in_loop, manifest: seconds per shard on Ray, per shard without Ray, and for the whole manifest.
        peak: peak MB of a worker.
    """

    shard: float
    in_loop: float
    manifest: float
    peak: float


def measure_round(
    photos: Path, folder: Path, settings: dict[str, object], workers: int
) -> tuple[float, float, float]:
    """Seconds on one worker, of the attacks alone in this process, and on several workers."""
    one, _ = run_on_ray(make_prepared(photos, folder, settings), 1)
    alone = _attack_alone(make_prepared(photos, folder, settings))
    many = one if workers == 1 else run_on_ray(make_prepared(photos, folder, settings), workers)[0]
    return one, alone, many


def make_prepared(photos: Path, folder: Path, settings: dict[str, object]) -> Prepared:
    artifact = folder / "artifact"
    shutil.rmtree(artifact, ignore_errors=True)
    return prepare(MergeConfig.model_validate({"source": str(photos), "artifact": str(artifact), **settings}))


def make_writer(prepared: Prepared) -> ArtifactWriter:
    writer = ArtifactWriter(Location(prepared.config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    return writer


def run_on_ray(prepared: Prepared, workers: int) -> tuple[float, float]:
    """Seconds from when every worker is ready until the last shard is committed, and a worker's peak memory in MB.

    Each worker's first shard is not counted, since it includes the worker's start, whose cost does not grow with the
    job. The time of the rest is scaled to all shards.
    """
    config = prepared.config.model_copy(update={"max_workers": workers})
    prepared = Prepared(**{**vars(prepared), "config": config})
    writer = make_writer(prepared)
    shards = range(prepared.plan.layout.shards)
    ends, peak = [], 0.0
    with ray_stage.on_ray(config):
        for result in ray_stage.run_shards(prepared.plan, shards, worker_setup(prepared, writer, config.device)):
            if not isinstance(result, ShardResult):
                raise SystemExit(f"shard {result.shard}: {result.reason}")
            ends.append(time.perf_counter())
            if len(ends) == len(shards) - 1:
                peak = _workers_peak()
    return (ends[-1] - ends[workers - 1]) / (len(shards) - workers) * len(shards), peak


def _workers_peak() -> float:
    """Peak resident memory of the largest Ray worker on this machine, in MB; 0 without /proc."""
    peaks = [0.0]
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            facts = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:  # the process has just ended
            continue
        # A zombie process has no memory field.
        if facts["Name"].strip().startswith("ray::_RayWorker") and "VmHWM" in facts:
            peaks.append(int(facts["VmHWM"].split()[0]) / 1024)
    return max(peaks)


def _attack_alone(prepared: Prepared) -> float:
    """Seconds of the attacks of all shards, one after the other, in this process."""
    worker = ShardWorker(worker_setup(prepared, make_writer(prepared), prepared.config.device))
    worker.prepare()
    worker.run(ShardTask(0, prepared.plan.task(0).groups[:1]))
    return sum(worker.run(prepared.plan.task(shard)).attack_seconds for shard in range(prepared.plan.layout.shards))


def bare_scaling(encoder: str) -> float:
    """Speed-up of two processes over one, with forward and backward passes only."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.starmap(_passes, [(encoder, 1)] * 2)  # both have imported everything
        alone = pool.apply(_passes, (encoder, 5))
        together = max(pool.starmap(_passes, [(encoder, 5)] * 2))
    return 2 * alone / together


def _passes(encoder: str, count: int) -> float:
    """Seconds of forward and input-only backward passes on one thread."""
    torch.set_num_threads(1)
    network = load_encoder(encoder).requires_grad_(False)
    pixels = torch.full((4, *network.input_shape), 0.5, requires_grad=True)

    def once() -> tuple[Tensor, ...]:
        return torch.autograd.grad(network(pixels).sum(), pixels)

    once()
    return _seconds(lambda: [once() for _ in range(count)])


def measure_overhead(folder: Path, count: int) -> Overhead:
    """Cost per shard without an attack."""
    photos = make_photos(folder / f"tiny-{count}.npz", count, OVERHEAD_SHAPE[1])
    settings = {"encoder": "mlp:3x2x2-2", "groups_per_shard": 1, "members": 1, "steps": 0, "format": "webdataset"}
    prepared = make_prepared(photos, folder, settings | {"device": "cpu"})
    worker = ShardWorker(worker_setup(prepared, make_writer(prepared), "cpu"))
    worker.prepare()
    tasks = [prepared.plan.task(shard) for shard in range(min(count, 1000))]
    loop = _seconds(lambda: [worker.run(task) for task in tasks])
    seconds, peak = run_on_ray(make_prepared(photos, folder, settings | {"device": "cpu"}), 1)
    finished = _seconds(lambda: make_writer(prepared).finish())
    return Overhead(seconds / count, loop / len(tasks), finished, peak)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def make_photos(path: Path, count: int, size: int) -> Path:
    """Smooth random images, which compress as photos do."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, -(-size // 8), -(-size // 8), 3), np.uint8)
    images = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    np.savez(path, images=images)
    return path


if __name__ == "__main__":
    main()
