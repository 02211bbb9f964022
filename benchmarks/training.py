"""Training steps compared with their floors, on an artifact of random 8-bit groups with targets and members.

    loop   one run of the trainer per format, in blocks of steps: fed by the artifact, then by the same batches in
           memory. Before each of the latter a ten-line PyTorch loop does the same step on its own network.
             stream     step fed by the artifact / step on tensors in memory                          (bar 1.03)
             wait       share of the time of the steps fed by the artifact spent waiting for it       (bar 2 %)
             bare       step of the trainer / step of the ten-line loop                               (bar 1.03)
    arms   steps of the arms in turn, on batches in memory: ratios of their times
                       (bars: gauss_newton / ind 0.30, sampled and factors / ind 0.15, gauss_newton / plain 2.5)
    start  seconds from `datamerge train` to the end of its first step, by number of shards (bar: 5 s without the
           model)

A ratio is the median over pairs of neighbouring steps, followed by the standard error of that median. `loop` also
gives the ratio of CPU times of the whole process, including reading threads: the loss where these have no core of
their own.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, get_args

import click
import numpy as np
import torch

from datamerge.encoders import load_encoder
from datamerge.runtime.checkout import commit
from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record, open_artifact
from storage_schemas.schema.factors import factor_spec, stored_factors
from storage_schemas.schema.record import encode_exact
from trainer import Draws, SquaredError, TrainConfig, gauss_newton
from trainer.arms import ArmName
from trainer.data.batches import Batch, MomentBatch
from trainer.data.blend import Blend
from trainer.data.order import WHOLE, Partition
from trainer.data.stream import Collate, Groups, Wanted
from trainer.estimators.base import BATCH_NORMS
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import Processes
from trainer.run.job import Job, make_job
from trainer.run.loop import run_job
from trainer.run.update import Optimisation

ARMS: dict[str, dict[str, Any]] = {
    "gauss_newton": {},
    "sampled": {"estimator": "sampled"},
    "antithetic": {"estimator": "antithetic"},
    "plain": {"arm": "mean-only"},
    "ind": {"arm": "ind"},
    "factors": {"arm": "factors"},
}
RATIOS = [
    ("gauss_newton", "ind", "0.30"),
    ("sampled", "ind", "0.15"),
    ("factors", "ind", "0.15"),
    ("gauss_newton", "plain", "2.5"),
    ("sampled", "plain", ""),
    ("antithetic", "plain", ""),
    ("ind", "plain", ""),
]


@click.group()
def main() -> None:
    """Training benchmarks; each prints a Markdown table."""


def _options(command: Callable[..., None]) -> Callable[..., None]:
    """Options of both `loop` and `arms`."""
    for option in (
        click.option("--encoder", default="timm:resnet18", show_default=True),
        click.option("--batch", default=2, show_default=True),
        click.option("--members", default=10, show_default=True),
        click.option("--threads", default=1, show_default=True),
        click.option("--device", default="cpu", show_default=True),
        click.option("--precision", default="float32", show_default=True),
        click.option("--rounds", default=9, show_default=True, type=click.IntRange(3)),
    ):
        command = option(command)
    return command


def _heading(**options: Any) -> None:
    cuda = str(options.get("device", "cpu")).startswith("cuda")
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    torch.set_num_threads(options.get("threads", 1))
    click.echo(f"{options}, commit {commit()}, {date.today()}, {hardware}, torch {torch.__version__}\n")


@main.command()
@_options
@click.option(
    "--block",
    default=4,
    show_default=True,
    type=click.IntRange(3),
    help="Steps per block; the first is not counted.",
)
@click.option("--data-workers", default=0, show_default=True)
@click.option("--log-every", default=10, show_default=True)
def loop(encoder: str, members: int, data_workers: int, log_every: int, rounds: int, **options: Any) -> None:
    """Steps with streaming and with the trainer's loop, compared with the same steps without them."""
    _heading(encoder=encoder, rounds=rounds, data_workers=data_workers, log_every=log_every, **options)
    click.echo("| ratio | wall time | CPU time | bar |\n|---|---|---|---|")
    settings = {name: options[name] for name in ("device", "precision")}
    settings |= {"batch_size": options["batch"], "data_workers": data_workers, "log_every": log_every}
    for kind in ("zarr", "webdataset"):
        feed = run_blocks(kind, encoder, members, rounds, options["block"], **settings)
        for name, over, under, bar in (
            ("stream / in memory", "stream", "memory", "1.03"),
            ("waiting / stream", "wait", "stream", "0.02"),
            ("trainer / bare loop", "memory", "bare", "1.03"),
        ):
            wall, cpu = ([pair[clock] for pair in feed.ratios(over, under)] for clock in (0, 1))
            click.echo(f"| {name}, {kind} | {_median(wall)} | {_median(cpu)} | {bar} |")
        click.echo(f"in memory {statistics.median(wall for wall, _ in feed.times['memory']):.4f} s a step", err=True)


def run_blocks(kind: str, encoder: str, members: int, rounds: int, block: int, **settings: Any) -> _Blocks:
    """Run the trainer with these settings on an artifact of the format `kind`; the result holds the times."""
    with tempfile.TemporaryDirectory() as name:
        artifact = make_artifact(Path(name, "artifact"), encoder, kind, 4 * settings["batch_size"], members)
        job = make_job(
            TrainConfig(artifact=artifact, run=str(Path(name, "run")), steps=2 * block * rounds, **settings)
        )
        feed = _Blocks(job, _Bare(encoder, settings["device"], settings["precision"]), block)
        run_job(replace(job, feed=feed), RunFolder(job.config.run), Processes())
    return feed


def _median(ratios: list[float]) -> str:
    first, middle, last = statistics.quantiles(ratios, n=4)
    # For a normal distribution the quartiles are 1.349 sigma apart, and a median has 1.253 times a mean's error.
    error = 1.253 * (last - first) / 1.349 / len(ratios) ** 0.5
    return f"{middle:.3f} ± {error:.3f}"


@main.command()
@_options
def arms(encoder: str, members: int, rounds: int, **options: Any) -> None:
    """Ratios between steps of the arms."""
    _heading(encoder=encoder, members=members, rounds=rounds, **options)
    settings = {name: options[name] for name in ("device", "precision")}
    seconds = arm_seconds(encoder, members, rounds, batch_size=options["batch"], **settings)
    click.echo("| ratio | measured | bar |\n|---|---|---|")
    for over, under, bar in RATIOS:
        ratios = [a / b for a, b in zip(seconds[over], seconds[under], strict=True)]
        click.echo(f"| {over} / {under} | {_median(ratios)} | {bar} |")
    plain = statistics.median(seconds["plain"])
    click.echo(f"\nplain step {plain:.3f} s, {options['batch'] / plain:.1f} groups/s")


def arm_seconds(encoder: str, members: int, rounds: int, **settings: Any) -> dict[str, list[float]]:
    """Seconds of a step of every arm, `rounds` times in turn, with these settings of the trainer."""
    with tempfile.TemporaryDirectory() as name:
        groups = 4 * settings["batch_size"]
        artifact = make_artifact(Path(name, "artifact"), encoder, "zarr", groups, members, factors=1)
        work: dict[str, Callable[[int], None]] = {}
        for arm, own in ARMS.items():
            config = TrainConfig(artifact=artifact, run=str(Path(name, arm)), steps=rounds + 1, **settings, **own)
            work[arm] = _steps(make_job(config))
        return _interleaved(work, rounds)


def _steps(job: Job) -> Callable[[int], None]:
    """Runs a given step of a run, on batches in memory."""
    training, batches = Optimisation(job, Processes()), list(job.feed(WHOLE, 0, job.steps))

    def work(step: int) -> None:
        training.step(step, iter(batches[step:]), lambda: 0)
        if job.device.type == "cuda":
            torch.cuda.synchronize()  # otherwise AdamW's time would count for the next arm

    return work


def _interleaved(work: Mapping[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each kind of work, `rounds` times in turn, after a round for warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for round_number in range(rounds + 1):
        for name, run in work.items():
            started = time.perf_counter()
            run(round_number)
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    return seconds


@main.command()
@click.option("--shards", default=10_000, show_default=True)
@click.option("--format", "kind", default="webdataset", show_default=True)
@click.option("--folder", required=True, help="Folder of the artifacts; existing ones are reused.")
@click.option("--rounds", default=7, show_default=True)
def start(shards: int, kind: str, folder: str, rounds: int) -> None:
    """Seconds of the whole command for one step of a tiny network."""
    _heading(shards=shards, kind=kind, rounds=rounds)
    paths = {count: Path(folder, f"{kind}-{count}") for count in (1, shards)}
    for count, path in paths.items():
        if not path.exists():
            make_artifact(path, "mlp:1x4x4-8-6", kind, count, 2, per_shard=1)
    with tempfile.TemporaryDirectory() as runs:
        work = {str(count): partial(_command, path, Path(runs, str(count))) for count, path in paths.items()}
        seconds = _interleaved(work, rounds)
    one, many = (statistics.median(seconds[str(count)]) for count in paths)
    click.echo(f"{kind}: {one:.2f} s with one shard, {many:.2f} s with {shards}")


@main.command()
@click.option(
    "--rounds", default=8, show_default=True, help="Batches of 32 groups per kind and arm; prints the median."
)
def feed(rounds: int) -> None:
    """CPU time to read a group and put it into a batch: one thread, 224 x 224 pixels, 10 members, 1 factor."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("webdataset", "zarr"):
            url = make_artifact(Path(folder, kind), "mlp:3x224x224-16-16", kind, 128, 10, 32, factors=1)
            for arm in get_args(ArmName):
                ms, megabytes = _feed_ms(url, arm, rounds)
                click.echo(f"{kind}, {arm}: {ms:.3f} ms, {megabytes:.2f} MB to the device")


def _feed_ms(url: str, arm: ArmName, rounds: int) -> tuple[float, float]:
    collate = Collate(arm, labels=False, members=10)
    groups = Groups(Blend.of(open_artifact(url)).only(collate.arrays(), facts=False), None, collate.taken)
    times, size = [], 0
    for number in range(rounds):
        chosen = np.random.default_rng(number).permutation(128)[:32]
        started = time.process_time()
        batch = collate([groups[Wanted(int(index), int(index) * 7)] for index in chosen])
        times.append(time.process_time() - started)
        assert isinstance(batch, Batch)
        size = batch.nbytes
    return float(np.median(times)) / 32 * 1e3, size / 32 / 1e6


def _command(artifact: Path, run: Path, number: int) -> None:
    arguments = [str(artifact), f"{run}-{number}", "--steps", "1", "--device", "cpu"]
    subprocess.run([sys.executable, "-m", "datamerge", "train", *arguments], check=True, capture_output=True)


def make_artifact(
    path: Path, spec: str, kind: Any, groups: int, members: int, per_shard: int = 8, factors: int = 0
) -> str:
    """Write an artifact that compresses like photos: smooth images with PGD-like members around them."""
    model = load_encoder(spec)
    shape = model.input_shape
    layout = Layout(
        format=kind,
        encoding="uint8_moments",
        arrays=(
            ArraySpec(name="sum", dtype="uint16", shape=shape),
            ArraySpec(name="scatter", dtype="uint16", shape=shape),
            ArraySpec(name="target", dtype="float32", shape=(model.embedding_dim,)),
            ArraySpec(name="members", dtype="uint8", shape=(members, *shape)),
            *([factor_spec(factors, members, 4, shape)] if factors else []),
        ),
        groups=groups,
        groups_per_shard=per_shard,
    )
    writer = ArtifactWriter(Location(path), layout, {"seed": 0, "encoder": {"spec": spec, "sha256": model.sha256}})
    writer.begin({})
    rng = np.random.default_rng(0)
    for shard in range(layout.shards):
        numbers = range(shard * per_shard, min((shard + 1) * per_shard, groups))
        writer.commit(shard, [_record(number, layout, rng, members) for number in numbers], [])
    writer.finish()
    return str(path)


def _record(number: int, layout: Layout, rng: np.random.Generator, members: int) -> Record:
    channels, height, width = layout.pixels
    coarse = rng.integers(2, 254, (channels, -(-height // 8), -(-width // 8)))
    clean = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)[:, :height, :width]
    images = (clean + rng.integers(-2, 3, (members, channels, height, width))).clip(0, 255).astype(np.uint8)
    arrays = {**encode_exact(ExactMoments.of(images), layout), "members": images}
    arrays["target"] = rng.normal(size=layout.arrays[2].shape).astype(np.float32)
    if layout.array("factors") is not None:
        arrays["factors"] = stored_factors(images, layout, "sketch", 0, f"k{number}")
    return Record(key=f"k{number}", count=members, encoding="uint8_moments", arrays=arrays)


Times = tuple[float, float]
"""(wall time, CPU time of all threads) in seconds."""


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _since(start: Times) -> Times:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


class _Blocks:
    """A feed in blocks of steps, from the artifact and then from memory, that times the loop between two batches.

    Attributes:
        times: times of the counted steps: `stream`, `wait` (part of it), `memory` and `bare`, equally many of each.
    """

    def __init__(self, job: Job, bare: _Bare, block: int) -> None:
        self._read, self._block, self._bare = job.feed, block, bare
        self._memory = list(job.feed(WHOLE, 0, block))
        self.times: dict[str, list[Times]] = {"stream": [], "wait": [], "memory": [], "bare": []}

    def __call__(self, cut: Partition, start: int, stop: int) -> Iterator[Batch]:
        stored = self._read(cut, start, stop)
        for first in range(0, stop - start, 2 * self._block):
            for step in range(self._block):
                started = _now()
                batch = next(stored)
                waited = _since(started)
                yield batch
                if step and first:  # the first block warms up
                    self.times["wait"].append(waited)
                    self.times["stream"].append(_since(started))
            for step, batch in enumerate(self._memory):
                started = _now()
                self._bare(batch)
                alone = _since(started)
                started = _now()
                yield batch
                if step and first:
                    self.times["memory"].append(_since(started))
                    self.times["bare"].append(alone)

    def ratios(self, over: str, under: str) -> list[Times]:
        """Ratios between neighbouring steps, or between steps at the same place in neighbouring blocks."""
        pairs = zip(self.times[over], self.times[under], strict=False)
        return [(wall / wall_under, cpu / cpu_under) for (wall, cpu), (wall_under, cpu_under) in pairs]


class _Bare:
    """A minimal training loop around `gauss_newton`, as one would write it by hand; each call does one step."""

    def __init__(self, spec: str, device: str, precision: str) -> None:
        self._device, self._bf16 = torch.device(device), precision == "bfloat16"
        self._model, self._loss, self._step = load_encoder(spec, device), SquaredError(), 0
        for module in self._model.train().modules():
            if isinstance(module, BATCH_NORMS):
                module.eval()
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-5, weight_decay=1e-4)

    def __call__(self, batch: Batch) -> None:
        here = batch.to(self._device).floats()
        if not isinstance(here, MomentBatch):
            raise ValueError("expected merged groups")
        self._step += 1
        draws = Draws([self._step * 1000 + i for i in range(len(here.keys))])
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
            losses = gauss_newton(self._model, here.mean, here.variance, here.target, self._loss, draws).loss
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), float("inf"))
        self._optimizer.step()
        float(losses.mean().detach())


if __name__ == "__main__":
    main()
