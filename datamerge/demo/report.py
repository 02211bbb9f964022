"""One PNG: what was merged, how training went, and the accuracies afterwards."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt
from PIL import Image

from datamerge.evaluation import ArmResult
from storage_schemas import open_artifact
from storage_schemas.card.contact_sheet import contact_sheet


def write_report(root: Path, artifact: str, runs: Sequence[str], arms: Sequence[ArmResult]) -> Path:
    """Draw `report.png` in the demo's folder from what the commands wrote."""
    figure = plt.figure(figsize=(12, 10), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=[3, 2])
    sheet = figure.add_subplot(grid[0, :])
    sheet.imshow(Image.open(io.BytesIO(contact_sheet(open_artifact(artifact), groups=4))))
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
    plt.close(figure)
    return path
