"""One PNG: what was merged, how training went, and the accuracies afterwards."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from datamerge.artifacts import preview
from datamerge.evaluation import ArmResult


def write_report(root: Path, artifact: str, runs: Sequence[str], arms: Sequence[ArmResult]) -> Path:
    """Draw `report.png` in the demo's folder from what the commands wrote."""
    # Not by pyplot, which may want a display, and is the user's.
    figure = Figure(figsize=(12, 10), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 2])
    sheet = figure.add_subplot(grid[0, :])
    sheet.imshow(preview(artifact, groups=4))
    sheet.set_title("groups: clean, members, mean, mean − first member, variance")
    sheet.axis("off")
    curves = figure.add_subplot(grid[1, 0])
    for run in runs:
        lines = [json.loads(line) for line in (root / run / "log.jsonl").read_text().splitlines()]
        curves.plot([line["step"] for line in lines], [line["loss"] for line in lines], label=run)
    curves.set(xlabel="step", ylabel="training loss", yscale="log")
    curves.legend()
    bars = figure.add_subplot(grid[1, 1])
    positions = range(len(arms))
    for offset, kind in enumerate(("clean", "robust")):
        scores = [arm.score(f"accuracy {kind}") for arm in arms]
        errors = [score.error for score in scores]
        bars.bar(
            [p + 0.4 * offset for p in positions], [score.value for score in scores], 0.4, yerr=errors, label=kind
        )
    bars.set_xticks([p + 0.2 for p in positions], [arm.arm for arm in arms])
    bars.set(ylabel="test accuracy, %", ylim=(0, 115))
    bars.legend(loc="upper center", ncols=2)
    path = root / "report.png"
    figure.savefig(path, dpi=110)
    return path
