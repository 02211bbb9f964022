"""Cost of large merges as `datamerge merge --dry-run` estimates it, and the error of such estimates.

Jobs of several sizes are planned from a sample of each (merge_service/estimate.py) and then merged by one worker. For
a larger encoder the time is its counted FLOPs over the FLOP/s that the last of these jobs reached, and the bytes per
pixel value are those of that job.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from benchmarks.merge_scaling import MEMORY, make_photos, make_prepared, run_on_ray
from benchmarks.report import Bar, Curve, Findings, Table
from datamerge.encoders import load_encoder
from merge_service import MergeConfig
from merge_service.estimate import Estimate, count_passes, estimate, group_flops

LARGE = "open_clip:ViT-L-14"
# Training images of ImageNet-1k; pairs of LAION-400M (Schuhmann et al. 2021, arXiv 2111.02114).
GROUPS = {"ImageNet": 1_281_167, "LAION-400M": 413_000_000}
# FLOP/s of an H100 SXM in float32 without TF32, from its data sheet, and the assumed share of it that is reached.
H100 = 0.35 * 67e12
# USD for an hour of a device; assumed.
PRICES = {"cpu": 0.04, "cuda": 2.5}
ASSUMPTIONS = (
    "What was measured here is a device: one core, or the GPU. Its plans assume that the large encoder reaches as "
    "many FLOP/s as the measured one, and that devices share the work evenly. H100: 35 % of 67 TFLOP/s. "
    "Costs are in USD at assumed prices: 0.04 for a core's hour, 2.50 for a GPU's."
)


@dataclass(frozen=True)
class Job:
    """The size of a merge."""

    groups: int
    members: int
    steps: int
    shards: int = 4


@dataclass(frozen=True)
class Outcome:
    """A job, its plan, and the measured seconds and bytes."""

    job: Job
    planned: Estimate
    seconds: float
    bytes: float

    @property
    def planned_seconds(self) -> float:
        """Planned seconds without the start of the worker, which `seconds` excludes too."""
        return self.planned.seconds - self.planned.start_seconds

    def errors(self) -> tuple[float, float]:
        """(planned − measured) / measured, of seconds and of bytes."""
        return self.planned_seconds / self.seconds - 1, self.planned.bytes / self.bytes - 1


@dataclass(frozen=True)
class Plan:
    """Estimated cost of a large job.

    Attributes:
        devices: smallest number of devices that meet the deadline if they share the work evenly.
        hours: wall time on these devices.
        cost: cost of all devices, in the currency of the price.
    """

    device_hours: float
    devices: int
    hours: float
    bytes: float
    cost: float

    @classmethod
    def of(cls, device_hours: float, volume: float, deadline_hours: float, price: float) -> Plan:
        """Estimate a job from its total device time; the price is that of one device hour."""
        devices = max(1, math.ceil(device_hours / deadline_hours))
        return cls(device_hours, devices, device_hours / devices, volume, device_hours * price)


def jobs(scale: int) -> list[Job]:
    """Three jobs that differ only in groups, then others; the last has the paper's members and steps."""
    return [*(Job(count * scale, 2, 3) for count in (32, 64, 128)), Job(32 * scale, 8, 3), Job(16 * scale, 10, 10)]


def measure(encoder: str, job: Job, photos: Path, folder: Path, device: str, batch_size: int) -> Outcome:
    """Plan a merge of this size (or of all photos if there are fewer), then run it on one worker."""
    settings: dict[str, object] = {"encoder": encoder, "members": job.members, "steps": job.steps}
    settings |= {"groups_per_shard": job.groups // job.shards, "limit_first": job.groups, "max_workers": 1}
    prepared = make_prepared(photos, folder, settings | {"device": device, "batch_size": batch_size})
    planned = estimate(prepared)
    seconds, _ = run_on_ray(prepared, 1)
    artifact = Path(prepared.config.artifact)
    volume = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    layout = prepared.plan.layout
    return Outcome(replace(job, groups=layout.groups, shards=layout.shards), planned, seconds, float(volume))


def measure_all(encoder: str, photos: Path | None, device: str, scale: int, batch_size: int) -> list[Outcome]:
    """Outcome of each job; without photos the images are smooth noise."""
    folder = Path(tempfile.mkdtemp(prefix="datamerge-planning-", dir=MEMORY if MEMORY.is_dir() else None))
    try:
        wanted = jobs(scale)
        images = photos or make_photos(folder / "photos.npz", max(job.groups for job in wanted), 224)
        return [measure(encoder, job, images, folder, device, batch_size) for job in wanted]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_plans(encoder: str, reached: Outcome, deadline_hours: float, price: float) -> list[tuple[str, str, Plan]]:
    """Estimates of the paper's attack on both data sets, on devices like this one and on H100s.

    Args:
        encoder: encoder of the measured job.
        reached: a measured job with the paper's members and steps.
        price: price of an hour of a device like this one.
    """
    job = reached.job
    large = load_encoder(LARGE).eval().requires_grad_(False).to("meta")
    config = MergeConfig(source="photos", artifact="adv", encoder=LARGE, members=job.members, steps=job.steps)
    flops = group_flops(config, count_passes(large, large.input_shape))
    bytes_a_value = reached.bytes / job.groups / math.prod(load_encoder(encoder).input_shape)
    devices = {
        "measured here": (reached.planned.flop_per_second or math.nan, price),
        "H100, counted": (H100, PRICES["cuda"]),
    }
    plans = []
    for name, groups in GROUPS.items():
        volume = groups * bytes_a_value * math.prod(large.input_shape)
        for by, (rate, price_there) in devices.items():
            plans.append((name, by, Plan.of(groups * flops / rate / 3600, volume, deadline_hours, price_there)))
    return plans


def findings(outcomes: Sequence[Outcome], plans: Sequence[tuple[str, str, Plan]]) -> Findings:
    """Report of estimation errors, growth with size, and estimates for large jobs."""
    rows = []
    for outcome in outcomes:
        job, (seconds, volume) = outcome.job, outcome.errors()
        rows.append(
            [
                f"{job.shards}, {job.groups}, {job.members}, {job.steps}",
                f"{outcome.planned_seconds:.2f}",
                f"{outcome.seconds:.2f}",
                f"{seconds:+.1%}",
                f"{outcome.planned.bytes / 1e6:.2f}",
                f"{outcome.bytes / 1e6:.2f}",
                f"{volume:+.1%}",
            ]
        )
    columns = ("shards, groups, N, steps", "s, planned", "measured", "error", "MB, planned", "measured", "error")
    planned = [
        [
            job,
            by,
            f"{plan.device_hours:,.0f}",
            f"{plan.devices:,}",
            f"{plan.hours:.1f}",
            f"{plan.bytes / 1e12:.2f}",
            f"{plan.cost:,.0f}",
        ]
        for job, by, plan in plans
    ]
    errors = [[abs(error) for error in column] for column in zip(*(o.errors() for o in outcomes), strict=True)]
    first = outcomes[0].job
    growing = [o for o in outcomes if (o.job.members, o.job.steps) == (first.members, first.steps)]
    lines = {
        "measured": [(float(o.job.groups), o.seconds) for o in growing],
        "model: planned": [(float(o.job.groups), o.planned_seconds) for o in growing],
    }
    return Findings(
        bars=[
            Bar("error of planned seconds", errors[0], 0.15),
            Bar("error of planned bytes", errors[1], 0.15),
        ],
        tables=[
            Table("Planned and measured", columns, rows),
            Table(
                "Plans: ViT-L/14 at 224 pixels, N = 10, 10 steps",
                ("job", "by", "device hours", "devices", "hours", "TB", "cost"),
                planned,
            ),
        ],
        curves=[Curve("groups", "s", lines)],
        notes=[ASSUMPTIONS],
    )


def run(
    encoder: str,
    photos: Path | None,
    device: str,
    *,
    scale: int = 1,
    batch_size: int = 64,
    deadline_hours: float = 24.0,
    price: float | None = None,
) -> Findings:
    """Measure the jobs and estimate the large ones."""
    outcomes = measure_all(encoder, photos, device, scale, batch_size)
    return findings(
        outcomes, make_plans(encoder, outcomes[-1], deadline_hours, PRICES[device] if price is None else price)
    )


@click.command()
@click.option("--encoder", default="timm:test_resnet", show_default=True, help="Encoder to measure.")
@click.option("--photos", type=click.Path(exists=True, path_type=Path), help="Folder; smooth noise by default.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--scale", default=1, show_default=True, help="Factor of the measured groups; 8 on a GPU.")
@click.option("--deadline-hours", default=24.0, show_default=True)
@click.option("--price", type=float, help="Price of an hour of this device; assumed if not given.")
def main(
    encoder: str, photos: Path | None, device: str, scale: int, deadline_hours: float, price: float | None
) -> None:
    """Print the cost of ImageNet and LAION-400M on devices like this one and on H100s, and the errors of plans."""
    found = run(encoder, photos, device, scale=scale, deadline_hours=deadline_hours, price=price)
    click.echo("\n".join([*found.notes, "", *(table.markdown() for table in found.tables)]))


if __name__ == "__main__":
    main()
