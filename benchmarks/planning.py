"""What a large merge takes, from small ones measured here: hours, devices, bytes, money.

    seconds of a worker    a·shards + b·groups + c·groups·N·(2·steps + 1)
    bytes                  d·shards + groups·(e + f·log2 N)

`2·steps + 1` forward passes a member: an input gradient is two, and the loss of the result is one more. Both are
fitted by least squares of the relative error, without negative coefficients. For another encoder c is scaled by its
FLOPs, and b, e and f by its pixels; Ray's own seconds of a shard are added to a. `datamerge merge --dry-run` measures
the job itself, which is closer where its data and encoder are at hand; experiments/paper/cost.py counts FLOPs.
"""

from __future__ import annotations

import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.merge_scaling import MEMORY, make_photos, make_prepared, make_writer, measure_overhead
from benchmarks.report import Bar, Curve, Findings, Table
from datamerge.encoders import load_encoder
from experiments.paper.cost import ClipEncoder, Gpu, attack
from experiments.paper.run import HERE
from experiments.paper.settings import read_study
from merge_service.merge import worker_setup
from merge_service.worker import ShardWorker

Floats = npt.NDArray[np.float64]
# The H100 that experiments.paper.run counts with.
H100 = Gpu({"half": 989e12, "float32": 67e12}, 0.35)
# Training images of ImageNet-1k; pairs of LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114).
GROUPS = {"ImageNet": 1_281_167, "LAION-400M": 413_000_000}

ASSUMPTIONS = (
    "What was measured here is a device: one core, or the GPU. Its plans assume that the large encoder reaches as "
    "many FLOP/s as the measured one, and that devices share the work evenly. H100: 35 % of 67 TFLOP/s. "
    "Costs are in USD at assumed prices: 0.04 for a core's hour, 2.50 for a GPU's."
)
# USD for an hour of a device; assumed.
PRICES = {"cpu": 0.04, "cuda": 2.5}


@dataclass(frozen=True)
class Size:
    """Of a merge."""

    shards: int
    groups: int
    members: int
    steps: int

    def time_terms(self) -> list[float]:
        """What a, b and c are multiplied by."""
        return [self.shards, self.groups, self.groups * self.members * (2 * self.steps + 1)]

    def byte_terms(self) -> list[float]:
        """What d, e and f are multiplied by."""
        return [self.shards, self.groups, self.groups * math.log2(self.members)]


@dataclass(frozen=True)
class Point:
    """A measured merge."""

    size: Size
    seconds: float
    bytes: float


@dataclass(frozen=True)
class Model:
    """Coefficients a, b, c in seconds and d, e, f in bytes."""

    time: tuple[float, ...]
    volume: tuple[float, ...]

    @classmethod
    def fit(cls, points: Sequence[Point]) -> Model:
        """Of at least three points that differ in all terms."""
        time_terms = [point.size.time_terms() for point in points]
        byte_terms = [point.size.byte_terms() for point in points]
        seconds, volumes = [point.seconds for point in points], [point.bytes for point in points]
        return cls(_relative_fit(time_terms, seconds), _relative_fit(byte_terms, volumes))

    def seconds(self, size: Size) -> float:
        """Of one worker."""
        return float(np.dot(self.time, size.time_terms()))

    def bytes(self, size: Size) -> float:
        """Of all shards."""
        return float(np.dot(self.volume, size.byte_terms()))

    def errors(self, point: Point) -> tuple[float, float]:
        """(predicted − measured) / measured, of seconds and of bytes."""
        seconds, volume = self.seconds(point.size), self.bytes(point.size)
        return seconds / point.seconds - 1, volume / point.bytes - 1

    def scaled(self, flops: float, pixels: float, ray_shard: float) -> Model:
        """For an encoder of so many times the FLOPs and the pixels; `ray_shard`: Ray's seconds of a shard."""
        a, b, c = self.time
        d, e, f = self.volume
        return Model((a + ray_shard, b * pixels, c * flops), (d, e * pixels, f * pixels))


@dataclass(frozen=True)
class Plan:
    """What a job takes.

    Attributes:
        devices: fewest that end before the deadline if they share the work evenly.
        hours: wall time on them.
        cost: of all devices, in the price's currency.
    """

    device_hours: float
    devices: int
    hours: float
    bytes: float
    cost: float

    @classmethod
    def of(cls, device_hours: float, volume: float, deadline_hours: float, price: float) -> Plan:
        """Of so much work; the price is that of a device for an hour."""
        devices = max(1, math.ceil(device_hours / deadline_hours))
        return cls(device_hours, devices, device_hours / devices, volume, device_hours * price)


@dataclass(frozen=True)
class Planned:
    """Points, the model they give, the point it has not seen, and plans by job and device."""

    points: list[Point]
    held_out: Point
    model: Model
    plans: list[tuple[str, str, Plan]]


def _relative_fit(terms: Sequence[Sequence[float]], values: Sequence[float]) -> tuple[float, ...]:
    """Least squares of (predicted − value) / value; the most negative coefficient is set to 0 until none is left."""
    matrix: Floats = np.asarray(terms, np.float64) / np.asarray(values, np.float64)[:, None]
    used = list(range(matrix.shape[1]))
    while True:
        found, *_ = np.linalg.lstsq(matrix[:, used], np.ones(len(matrix)), rcond=None)
        if not len(found) or found.min() >= 0:
            break
        used.pop(int(found.argmin()))
    coefficients = dict(zip(used, found.tolist(), strict=True))
    return tuple(coefficients.get(column, 0.0) for column in range(matrix.shape[1]))


def sizes(scale: int) -> tuple[list[Size], Size]:
    """One factor at a time, and a size outside of that; on a GPU groups have to be many to fill a batch."""
    members = [Size(1, 4 * scale, count, 3) for count in (1, 2, 4, 8)]
    groups = [Size(1, count * scale, 2, 3) for count in (2, 8, 16)]
    others = [Size(1, 4 * scale, 2, 10), Size(4, 8 * scale, 2, 3)]
    return members + groups + others, Size(2, 16 * scale, 10, 10)


def measure(
    encoder: str, size: Size, photos: Path, folder: Path, device: str, repeats: int, batch_size: int
) -> Point:
    """A merge of that size by one worker in this process; the median of its seconds."""
    settings: dict[str, object] = {"encoder": encoder, "members": size.members, "steps": size.steps}
    settings |= {"groups_per_shard": size.groups // size.shards, "limit": size.groups}
    prepared = make_prepared(photos, folder, settings | {"device": device, "batch_size": batch_size})
    writer = make_writer(prepared)
    worker = ShardWorker(worker_setup(prepared, writer, device))
    worker.prepare()
    tasks = [prepared.plan.task(shard) for shard in range(prepared.plan.layout.shards)]
    worker.run(tasks[0])  # warms up
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        attacks = sum(worker.run(task).attack_seconds for task in tasks)
        seconds = time.perf_counter() - started
        # On a GPU a worker reads and writes while it attacks.
        found.append(max(attacks, seconds - attacks) if device == "cuda" else seconds)
    shards = Path(writer.location.root)
    volume = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    return Point(size, statistics.median(found), float(volume))


def make_plans(
    encoder: str,
    photos: Path | None,
    device: str,
    *,
    scale: int = 1,
    repeats: int = 2,
    batch_size: int = 64,
    deadline_hours: float = 24.0,
    price: float | None = None,
) -> Planned:
    """Measure, fit, and plan the paper's attack on both data sets, by what was measured and by counted FLOPs."""
    small, large = sizes(scale)
    folder = Path(tempfile.mkdtemp(prefix="datamerge-planning-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        images = photos or make_photos(folder / "photos.npz", large.groups, 224)

        def point(size: Size) -> Point:
            return measure(encoder, size, images, folder, device, repeats, batch_size)

        points, held_out = [point(size) for size in small], point(large)
        overhead = measure_overhead(folder, 100)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    model = Model.fit(points)
    planned = Planned(points, held_out, model, [])
    study = read_study(HERE / "settings.toml")
    paper = ClipEncoder(study.vision)
    flops, values = _forward(encoder)
    scaled = model.scaled(paper.forward / flops, paper.values / values, max(0.0, overhead.shard - overhead.in_loop))
    for name, groups in GROUPS.items():
        size = Size(-(-groups // 256), groups, study.members, int(study.merge["steps"]))
        volume = scaled.bytes(size)
        here = PRICES[device] if price is None else price
        measured = Plan.of(scaled.seconds(size) / 3600, volume, deadline_hours, here)
        planned.plans.append((name, "measured here", measured))
        # `groups` is steps × batch_size of the training.
        job = study.model_copy(update={"train": {**study.train, "steps": groups, "batch_size": 1}})
        counted = attack(job, paper, H100)
        hours, kept = counted.hours or 0.0, groups * size.members * paper.values
        on_h100 = Plan.of(hours, counted.disk - kept, deadline_hours, PRICES["cuda"])
        planned.plans.append((name, "H100, counted", on_h100))
    return planned


def _forward(encoder: str) -> tuple[float, int]:
    """FLOPs of one image's embedding, and its values C·H·W."""
    network = load_encoder(encoder)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros((1, *network.input_shape)))
    return float(counter.get_total_flops()), math.prod(network.input_shape)


def findings(planned: Planned) -> Findings:
    """Coefficients, errors, growth and plans."""
    model, held_out = planned.model, planned.held_out
    rows = [_error_row(model, point, "") for point in planned.points]
    rows.append(_error_row(model, held_out, "held out"))
    points = Table("Points", ("shards, groups, N, steps", "s", "error", "MB", "error", ""), rows)
    plans = [
        [
            job,
            by,
            f"{plan.device_hours:,.0f}",
            f"{plan.devices:,}",
            f"{plan.hours:.1f}",
            f"{plan.bytes / 1e12:.2f}",
            f"{plan.cost:,.0f}",
        ]
        for job, by, plan in planned.plans
    ]
    columns = ("job", "by", "device hours", "devices", "hours", "TB", "cost")
    a, b, c = (1000 * value for value in model.time)
    d, e, f = (value / 1000 for value in model.volume)
    formula = (
        f"Fitted: {a:.2f} ms a shard, {b:.2f} ms a group, {c:.3f} ms a member's forward pass; {d:.1f} kB a shard, "
        f"{e:.1f} kB a group and {f:.1f} kB for each doubling of N."
    )
    seconds, volume = (abs(error) for error in model.errors(held_out))
    return Findings(
        bars=[
            Bar("error of seconds at the held-out size", [seconds], 0.15),
            Bar("error of bytes at the held-out size", [volume], 0.15),
        ],
        tables=[points, Table("Plans: ViT-L/14 at 224 pixels, N = 10, 10 steps, 256 groups a shard", columns, plans)],
        curves=[
            _curve(planned, "groups", [point for point in planned.points if point.size.members == 2]),
            _curve(
                planned,
                "N",
                [point for point in planned.points if point.size.groups == planned.points[0].size.groups],
            ),
        ],
        notes=[formula, ASSUMPTIONS],
    )


def _error_row(model: Model, point: Point, note: str) -> list[str]:
    size = point.size
    seconds, volume = model.errors(point)
    what = f"{size.shards}, {size.groups}, {size.members}, {size.steps}"
    return [what, f"{point.seconds:.2f}", f"{seconds:+.1%}", f"{point.bytes / 1e6:.2f}", f"{volume:+.1%}", note]


def _curve(planned: Planned, what: str, points: Sequence[Point]) -> Curve:
    """Seconds of a merge against its groups or members, and what the model says."""
    one_factor = [point for point in points if point.size.steps == 3 and point.size.shards == 1]

    def line(values: Sequence[float]) -> list[tuple[float, float]]:
        places = [point.size.groups if what == "groups" else point.size.members for point in one_factor]
        return sorted(zip(places, values, strict=True))

    measured = line([point.seconds for point in one_factor])
    return Curve(
        what, "s", {"measured": measured, "model": line([planned.model.seconds(p.size) for p in one_factor])}
    )


@click.command()
@click.option("--encoder", default="timm:test_resnet", show_default=True, help="That is measured.")
@click.option("--photos", type=click.Path(exists=True, path_type=Path), help="Folder; smooth noise by default.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--scale", default=1, show_default=True, help="Multiplies the groups that are measured; 16 on a GPU.")
@click.option("--repeats", default=2, show_default=True)
@click.option("--deadline-hours", default=24.0, show_default=True)
@click.option("--price", type=float, help="Of a device like this one for an hour; assumed if not given.")
def main(
    encoder: str,
    photos: Path | None,
    device: str,
    scale: int,
    repeats: int,
    deadline_hours: float,
    price: float | None,
) -> None:
    """Print what ImageNet and LAION-400M take on devices like this one, and on H100s as experiments/paper does."""
    planned = make_plans(
        encoder, photos, device, scale=scale, repeats=repeats, deadline_hours=deadline_hours, price=price
    )
    found = findings(planned)
    click.echo("\n".join([*found.notes, "", *(table.markdown() for table in found.tables)]))


if __name__ == "__main__":
    main()
