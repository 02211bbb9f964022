"""Part of `benchmarks.gpu`: whole shards merged by workers, and the time of each stage of a batch."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_rows import Rates, Row, Sizes, busy, sizes
from datamerge.attacks.ball import Ball, Gradients
from datamerge.encoders import load_encoder
from merge_service import MergeConfig, adversarial_groups
from merge_service.adversarial_groups import Attacker
from merge_service.merge import Prepared, prepare, worker_setup
from merge_service.worker import ShardWorker, WorkerSetup
from storage_schemas import ArtifactWriter, Location

PROCESSES = 4
# Shards of each process, after one for warm-up.
SHARDS = 2
MEMBERS = 10
PATIENCE = 20  # seconds that a process waits for the others


class Stage(NamedTuple):
    """A method of the attacker, and its description."""

    owner: Any
    name: str
    what: str


STAGES = (
    Stage(adversarial_groups, "draw_starts", "draws of the starts"),
    Stage(Ball, "placed", "starts: copied and placed"),
    Stage(Gradients, "at", "gradients"),
    Stage(Gradients, "loss_at", "losses of starts and ends"),
    Stage(adversarial_groups, "grid_levels", "pixels to 8 bits"),
    Stage(adversarial_groups, "moment_arrays", "moments"),
    Stage(adversarial_groups, "factor_array", "factors"),
    Stage(adversarial_groups, "on_host", "copies to the host"),
)


def merge_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Whole shards in two threads; the same in several processes on one GPU; the stages of one batch."""
    size = sizes(rehearse)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = (SHARDS + 1) * size.groups * (1 if rehearse else PROCESSES)
        _photos(folder / "photos", photos, load_encoder(size.base).input_shape[1])
        for precision in size.precisions[:2]:
            worker, prepared = _worker(folder, precision, size)
            attacked: list[float] = []

            def work(worker: ShardWorker = worker, prepared: Prepared = prepared, of: list[float] = attacked) -> None:
                of[:] = [_run(worker, prepared, range(1, SHARDS + 1))]

            started = time.perf_counter()
            work()
            seconds = time.perf_counter() - started
            what = f"base, {precision}, 1 process: a group; attacking {attacked[0] / seconds:.0%} of the time"
            yield _row(what, seconds, SHARDS * size.groups)
            # Profiling takes time, so the share comes from a separate run.
            share = busy(work, size.device)
            yield Row("merge", f"base, {precision}, 1 process: kernels run {share:.0%} of the time", 1000 * seconds)
        yield from _split(folder, size)
        yield _processes(folder, size, rehearse)


def _row(what: str, seconds: float, groups: int) -> Row:
    return Row("merge", what, 1000 * seconds / groups, rate=groups / seconds, unit="groups")


def _photos(folder: Path, count: int, side: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg")


def _prepared(folder: Path, name: str, precision: str, size: Sizes) -> tuple[Prepared, WorkerSetup]:
    """A merge into its own folder that has begun."""
    config = MergeConfig.model_validate(
        {
            "source": str(folder / "photos"),
            "artifact": str(folder / name),
            "encoder": size.base,
            "members": MEMBERS,
            "steps": 10,
            "factors": 1,
            "precision": precision,
            "groups_per_shard": size.groups,
            "batch_size": 512,
            "device": str(size.device),
        }
    )
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    return prepared, worker_setup(prepared, writer, str(size.device))


def _worker(folder: Path, precision: str, size: Sizes) -> tuple[ShardWorker, Prepared]:
    """A worker after its warm-up."""
    prepared, setup = _prepared(folder, precision, precision, size)
    worker = ShardWorker(setup)
    worker.prepare()
    worker.run(prepared.plan.task(0))
    return worker, prepared


def _run(worker: ShardWorker, prepared: Prepared, shards: Sequence[int]) -> float:
    """Merge shards in two threads, as a worker on Ray does; returns seconds of the attack."""
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda shard: worker.run(prepared.plan.task(shard)), shards))
    return sum(one.attack_seconds for one in found)


@dataclass(frozen=True)
class _Share:
    """Work of one of several processes.

    Attributes:
        setup: pickled setup of the worker.
        tasks: pickled shards; the first one is for warm-up.
        folder: folder in which the processes wait for each other and leave their results.
        number: number of this process.
        count: number of processes.
    """

    setup: bytes
    tasks: bytes
    folder: Path
    number: int
    count: int

    def __call__(self) -> None:
        worker, tasks = ShardWorker(pickle.loads(self.setup)), pickle.loads(self.tasks)
        worker.prepare()
        worker.run(tasks[0])
        (self.folder / f"ready-{self.number}").touch()
        until = time.monotonic() + PATIENCE
        while len(list(self.folder.glob("ready-*"))) < self.count:
            if time.monotonic() > until:
                return  # another one ended early
            time.sleep(0.001)
        started = time.time()
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(worker.run, tasks[1:]))
        (self.folder / f"times-{self.number}").write_text(f"{started} {time.time()}")


def _processes(folder: Path, size: Sizes, rehearse: bool) -> Row:
    """Groups per second of several processes on one GPU, as with `num_gpus=0.25`; one thread in a rehearsal."""
    precision, count = size.precisions[0], 1 if rehearse else PROCESSES
    prepared, setup = _prepared(folder, "processes", precision, size)
    start: Callable[..., Any] = (
        threading.Thread if rehearse else multiprocessing.get_context("spawn").Process  # CUDA does not survive a fork
    )
    meeting = folder / "meeting"
    meeting.mkdir()
    running = []
    for number in range(count):
        first = number * (SHARDS + 1)
        tasks = [prepared.plan.task(shard) for shard in range(first, first + SHARDS + 1)]
        share = _Share(pickle.dumps(setup), pickle.dumps(tasks), meeting, number, count)
        running.append(start(target=share, daemon=True))
        running[-1].start()
    for one in running:
        one.join()
    what = f"base, {precision}, {PROCESSES} processes: a group"
    times = [[float(text) for text in path.read_text().split()] for path in meeting.glob("times-*")]
    if len(times) < count:
        return Row("merge", f"failed: {what}: {count - len(times)} of them ended early", failed=True)
    seconds = max(end for _, end in times) - min(start for start, _ in times)
    return _row(what, seconds, count * SHARDS * size.groups)


def _split(folder: Path, size: Sizes) -> Iterator[Row]:
    """One batch through the attacker's three stages, one after the other and so without their overlap."""
    prepared, setup = _prepared(folder, "split", size.precisions[0], size)
    encoder = load_encoder(size.base, str(size.device)).requires_grad_(False)
    attacker = Attacker(prepared.config, prepared.plan.layout, encoder, encoder, None)
    groups = prepared.plan.task(0).groups[: attacker.groups_per_batch]
    rng = np.random.default_rng(0)
    batch = [(group, rng.integers(0, 256, encoder.input_shape, np.uint8)) for group in groups]
    for _ in range(2):  # the first one warms up
        spent: dict[str, float] = defaultdict(float)
        with _watched(spent, size.device), _timed("", spent, size.device):
            inputs = attacker.inputs(batch)
            with _timed("copy of the clean images", spent, size.device):
                inputs.clean.to(size.device, non_blocking=True)
            done = attacker.run(batch, inputs, [])
            if done is None:
                raise ValueError("no gradient was finite")
            attacker.records(done)
    whole = spent.pop("")
    what = f"one batch of {len(groups)} groups of the base, {setup.config.precision}"
    yield Row("merge", f"{what}: all of it, a group", 1000 * whole / len(groups))
    for stage, seconds in {**spent, "the rest": whole - sum(spent.values())}.items():
        yield Row("merge", f"{what}: {stage}, {seconds / whole:.0%} of it", 1000 * seconds / len(groups))


@contextmanager
def _watched(spent: dict[str, float], device: torch.device) -> Iterator[None]:
    """Add up the seconds of every stage in the block, waiting for the device before and after each stage."""
    with ExitStack() as patches:
        for stage in STAGES:
            patches.enter_context(patch.object(stage.owner, stage.name, _timing(stage, spent, device)))
        yield


def _timing(stage: Stage, spent: dict[str, float], device: torch.device) -> Callable[..., Any]:
    function = getattr(stage.owner, stage.name)

    def timing(*arguments: Any, **named: Any) -> Any:
        with _timed(stage.what, spent, device):
            return function(*arguments, **named)

    return timing


@contextmanager
def _timed(what: str, spent: dict[str, float], device: torch.device) -> Iterator[None]:
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    yield
    wait()
    spent[what] += time.perf_counter() - started
