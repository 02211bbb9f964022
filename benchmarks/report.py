"""Reports of benchmarks, as Markdown and as a picture.

A ratio is measured in every round, its two sides one after the other; a bar compares the median of these ratios with
a limit. Minimum and maximum over the rounds follow each median.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from datamerge.runtime.checkout import commit

PEERS = ("torchattacks", "foolbox", "webdataset", "litdata", "tensorstore", "zarr")
NOT_COMPARED = (
    "LitData reads the same records from chunks of its own and verifies nothing. MosaicML streaming 0.13 needs "
    "numpy < 2.2 and transformers < 5 and does not install beside the rest: `benchmarks/streaming.py` reads with it "
    "in an environment of its own."
)


@dataclass(frozen=True)
class Bar:
    """A limit and what was measured for it.

    Attributes:
        rounds: one value per round; empty if it could not be measured.
        limit: upper limit of the median, or lower limit if `at_least`.
    """

    what: str
    rounds: Sequence[float]
    limit: float
    at_least: bool = False

    @property
    def verdict(self) -> str:
        """`met`, `not met` or `not measured`."""
        if not self.rounds:
            return "not measured"
        middle = statistics.median(self.rounds)
        met = middle >= self.limit if self.at_least else middle <= self.limit
        return "met" if met else "not met"

    def cells(self) -> list[str]:
        """Cells of its row: what, median, range, limit, verdict."""
        sign = "≥" if self.at_least else "≤"
        return [self.what, *spread(self.rounds), f"{sign} {self.limit:g}", self.verdict]


@dataclass(frozen=True)
class Table:
    """A table with a heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The heading and the table."""
        lines = [f"## {self.title}", "", _row(self.columns), "|" + "---|" * len(self.columns)]
        return "\n".join([*lines, *(_row(cells) for cells in self.rows)]) + "\n"


@dataclass(frozen=True)
class Curve:
    """Cost against size: points (x, y) by name of the line; both axes are logarithmic."""

    x: str
    y: str
    lines: dict[str, list[tuple[float, float]]]


@dataclass
class Findings:
    """Results of one theme."""

    bars: list[Bar] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Circumstances:
    """Machine, versions and date of a measurement.

    Attributes:
        slug: the hardware, for file names.
        missing: peers that are not installed.
    """

    hardware: str
    slug: str
    day: str
    commit: str
    versions: str
    missing: tuple[str, ...]

    @classmethod
    def here(cls, device: str) -> Circumstances:
        """The conditions of this machine, commit and day."""
        cores = len(os.sched_getaffinity(0))
        cpu = f"{platform.machine()} {cores}-core"
        hardware = torch.cuda.get_device_name() if device == "cuda" else cpu
        missing = tuple(name for name in PEERS if importlib.util.find_spec(name) is None)
        installed = ["torch", *(name for name in PEERS if name not in missing)]
        return cls(
            hardware=hardware,
            slug=re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-"),
            day=str(date.today()),
            commit=commit(),
            versions=", ".join(f"{name} {version(name)}" for name in installed),
            missing=missing,
        )


def spread(rounds: Sequence[float]) -> list[str]:
    """Median, and minimum to maximum, for two cells of a table."""
    if not rounds:
        return ["–", "–"]
    middle, least, greatest = (_number(pick(rounds)) for pick in (statistics.median, min, max))
    return [middle, f"{least} to {greatest} ({len(rounds)})"]


def render(theme: str, found: Findings, where: Circumstances, command: str, seconds: float, load: float) -> str:
    """The report of a theme.

    Args:
        seconds: duration of the theme.
        load: load average when it began, which reveals other work on the machine.
    """
    lines = [
        f"# {theme.capitalize()}",
        "",
        f"`{command}`, commit {where.commit}, {where.day}, {where.hardware}, {where.versions}. "
        f"{seconds:.0f} s; load before it {load:.1f}.",
        "",
    ]
    if where.missing:
        lines += [f"Peers that are not installed and were left out: {', '.join(where.missing)}.", ""]
    if found.bars:
        columns = ("bar", "median", "range (rounds)", "limit", "")
        lines.append(Table("Bars", columns, [bar.cells() for bar in found.bars]).markdown())
    lines += [table.markdown() for table in found.tables]
    lines += [f"{note}\n" for note in found.notes]
    return "\n".join(lines)


def plot(curves: Sequence[Curve], path: Path) -> bool:
    """Plot the curves side by side; False without curves or without matplotlib."""
    if not curves or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.4), squeeze=False, layout="constrained")
    for axis, curve in zip(axes[0], curves, strict=True):
        for name, points in curve.lines.items():
            style = "--" if "model" in name else "o-"
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=curve.x, ylabel=curve.y)
        places, heights = (sorted({p[side] for points in curve.lines.values() for p in points}) for side in (0, 1))
        axis.set_xticks(places, labels=[f"{x:g}" for x in places])
        # With powers of ten alone, an axis of less than a decade would have no labels.
        marks = np.geomspace(heights[0], heights[-1], 4) if heights[0] < heights[-1] else heights[:1]
        axis.set_yticks(marks, labels=[f"{y:.3g}" for y in marks])
        axis.minorticks_off()
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
