"""The training step against its floors: bare loop, in-memory tensors, baselines. Ratios of medians in one process.

An artifact of random 8-bit groups is written for each format, with targets and members. All steps are taken from
the loop's own log of what it did: whole runs of the trainer, their time read from `run.json`.

    stream     run fed by the artifact / the same steps on batches that are already in memory       (bar 1.03)
    wait       share of the run's time spent waiting for data                                       (bar 2 %)
    bare       steps on in-memory batches by the trainer / by a ten-line PyTorch loop                (bar 1.03)
    avg/ind    AT-N-Avg step / AT-N-Ind step                       (bars 0.30 gauss_newton, 0.15 sampled)
    plain      step of an estimator / plain step on the mean                       (bar 2.5 gauss_newton)
    start      seconds from opening an artifact of many shards to its first batch             (bar 5 s)
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from adversarial import load_encoder
from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record
from storage_schemas.record import encode_exact
from trainer import Draws, SquaredError, TrainConfig, gauss_newton
from trainer.checkpoint import RunFolder
from trainer.distributed import Processes
from trainer.job import Job, make_job
from trainer.loop import run_job
from trainer.order import Layout as Cut
from trainer.stream import Batch

RUNS = {
    "avg gauss_newton": {},
    "avg sampled": {"estimator": "sampled"},
    "avg antithetic": {"estimator": "antithetic"},
    "avg jvp": {"estimator": "jvp"},
    "mean-only": {"arm": "mean-only"},
    "ind": {"arm": "ind"},
}


@click.command()
@click.option("--encoder", default="timm:resnet18", show_default=True)
@click.option("--members", default=10, show_default=True)
@click.option("--groups", default=16, show_default=True)
@click.option("--batch", default=2, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Of each run; one more warms up.")
@click.option("--repeats", default=3, show_default=True, help="Interleaved rounds.")
@click.option("--threads", default=1, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--precision", default="float32", show_default=True)
@click.option("--data-workers", default=0, show_default=True)
@click.option("--many", default=10_000, show_default=True, help="Shards of the artifact for `start`.")
def main(encoder: str, many: int, repeats: int, **options: Any) -> None:
    """Print a Markdown table."""
    torch.set_num_threads(options["threads"])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    hardware = torch.cuda.get_device_name() if options["device"].startswith("cuda") else f"{platform.machine()} CPU"
    click.echo(f"{encoder}, {options}, commit {commit.stdout.strip()}, {date.today()}, {hardware}\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifacts = {
            kind: _artifact(folder / kind, encoder, kind, options["groups"], 8, options["members"])
            for kind in ("zarr", "webdataset")
        }
        _ratios(folder, artifacts, encoder, repeats, options)
        if many:
            _start(folder, many)


def _artifact(path: Path, spec: str, kind: Any, groups: int, per_shard: int, members: int) -> str:
    """Random photos' worth of bytes: smooth images with PGD-like members around them."""
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
    channels, height, width = layout.arrays[0].shape
    coarse = rng.integers(2, 254, (channels, -(-height // 8), -(-width // 8)))
    clean = np.repeat(np.repeat(coarse, 8, axis=1), 8, axis=2)[:, :height, :width]
    images = (clean + rng.integers(-2, 3, (members, channels, height, width))).clip(0, 255).astype(np.uint8)
    arrays = {**encode_exact(ExactMoments.of(images), layout), "members": images}
    arrays["target"] = rng.normal(size=layout.arrays[2].shape).astype(np.float32)
    return Record(key=f"k{number}", count=members, encoding="uint8_moments", arrays=arrays)


class _InMemory:
    """A feed whose batches are tensors already; the same ones in every run."""

    def __init__(self, job: Job) -> None:
        self._batches = list(job.feed(Cut(), 0, job.steps))

    def __call__(self, cut: Cut, start: int, stop: int) -> Iterator[Batch]:
        return iter(self._batches[start:stop])


def _ratios(folder: Path, artifacts: dict[str, str], spec: str, repeats: int, options: dict[str, Any]) -> None:
    feeds: dict[str, _InMemory] = {}
    counter = iter(range(10**6))

    def run(settings: dict[str, Any], kind: str, in_memory: bool) -> tuple[float, float]:
        """Seconds a step without the first ones, and the share of waiting for data."""
        path = folder / f"run-{next(counter)}"
        config = TrainConfig(
            artifact=artifacts[kind],
            run=str(path),
            steps=options["steps"] + 1,
            batch_size=options["batch"],
            log_every=1,
            device=options["device"],
            precision=options["precision"],
            data_workers=options["data_workers"],
            **settings,
        )
        job = make_job(config)
        if in_memory:
            arm = settings.get("arm", "avg")
            feeds.setdefault(arm, _InMemory(job))
            job = replace(job, feed=feeds[arm])
        run_job(job, RunFolder(str(path)), Processes())
        lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()][1:]
        seconds = [options["batch"] / line["groups_per_second"] for line in lines]
        return statistics.median(seconds), statistics.mean(line["data_wait"] for line in lines)

    work: dict[str, Callable[[], tuple[float, float]]] = {
        "bare loop": lambda: (_bare(artifacts["zarr"], spec, feeds["avg"], options), 0.0),
        "stream zarr": lambda: run({}, "zarr", False),
        "stream webdataset": lambda: run({}, "webdataset", False),
    }
    work |= {name: (lambda s=settings: run(s, "zarr", True)) for name, settings in RUNS.items()}  # type: ignore[misc]
    run({}, "zarr", True)
    results: dict[str, list[tuple[float, float]]] = {name: [] for name in work}
    for _ in range(repeats):
        for name, measure in work.items():
            results[name].append(measure())

    def ratio(name: str, to: str) -> float:
        return statistics.median(a[0] / b[0] for a, b in zip(results[name], results[to], strict=True))

    rows = [
        ("stream / in memory, zarr", ratio("stream zarr", "avg gauss_newton"), "1.03"),
        ("stream / in memory, webdataset", ratio("stream webdataset", "avg gauss_newton"), "1.03"),
        ("data wait, zarr", statistics.median(wait for _, wait in results["stream zarr"]), "0.02"),
        ("data wait, webdataset", statistics.median(wait for _, wait in results["stream webdataset"]), "0.02"),
        ("trainer / bare loop", ratio("avg gauss_newton", "bare loop"), "1.03"),
        ("gauss_newton / ind", ratio("avg gauss_newton", "ind"), "0.30"),
        ("sampled / ind", ratio("avg sampled", "ind"), "0.15"),
        ("gauss_newton / plain", ratio("avg gauss_newton", "mean-only"), "2.5"),
        ("sampled / plain", ratio("avg sampled", "mean-only"), ""),
        ("antithetic / plain", ratio("avg antithetic", "mean-only"), ""),
        ("jvp / plain", ratio("avg jvp", "mean-only"), ""),
    ]
    click.echo("| ratio | measured | bar |\n|---|---|---|")
    for name, value, bar in rows:
        click.echo(f"| {name} | {value:.3f} | {bar} |")
    plain = statistics.median(seconds for seconds, _ in results["mean-only"])
    click.echo(f"\nplain step {plain:.3f} s, {options['batch'] / plain:.1f} groups/s; medians of {repeats} rounds")


def _bare(artifact: str, spec: str, feed: _InMemory, options: dict[str, Any]) -> float:
    """Seconds a step of what one would write by hand around `gauss_newton`."""
    model, loss = load_encoder(spec, options["device"]), SquaredError()
    for module in model.train().modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4)
    seconds = []
    bf16 = options["precision"] == "bf16"
    for step, batch in enumerate(feed(Cut(), 0, options["steps"] + 1)):
        started = time.perf_counter()
        here = batch.to(torch.device(options["device"]))
        if here.mean is None or here.variance is None:
            raise ValueError("expected merged groups")
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(options["device"].partition(":")[0], torch.bfloat16, enabled=bf16):
            draws = Draws([step * 1000 + i for i in range(len(here.keys))])
            value = gauss_newton(model, here.mean, here.variance, here.target, loss, draws).loss.mean()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        float(value.detach())
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def _start(folder: Path, shards: int) -> None:
    """Seconds to the first batch of an artifact with many shards, next to those with one shard."""
    spec, seconds = "mlp:1x4x4-8-6", {}
    for count in (1, shards):
        path = _artifact(folder / f"shards-{count}", spec, "webdataset", count, 1, 2)
        os.sync()
        started = time.perf_counter()
        job = make_job(TrainConfig(artifact=path, run=str(folder / f"start-{count}"), steps=10))
        next(job.feed(Cut(), 0, job.steps))
        seconds[count] = time.perf_counter() - started
    click.echo(f"\nstart to first batch: {seconds[shards]:.2f} s with {shards} shards, {seconds[1]:.2f} s with one")


if __name__ == "__main__":
    main()
