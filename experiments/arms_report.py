"""Table and plot of the arms of one settings file."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

HEADER = "| arm | clean | robust | by seed | embedding loss clean / attacked | forward passes a group and step | MB |"


def report(facts: dict[str, Any], settings: Path) -> None:
    """Write results-NAME.json, results-NAME.md and plot-NAME.png beside NAME.toml."""
    name, folder, rows = settings.stem, settings.parent, facts["rows"]
    (folder / f"results-{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [f"`{facts['command']}`, commit {facts['commit']}, {facts['hardware']}", "", HEADER, "|---" * 7 + "|"]
    lines += [_line(arm, row) for arm, row in rows.items()]
    error = max((_error(row) for row in rows.values()), default=0.0)
    lines += ["", f"Standard error of an accuracy over the images at most {error:.3f}; all arms see the same images."]
    (folder / f"results-{name}.md").write_text("\n".join(lines) + "\n")
    _plot(rows, folder / f"plot-{name}.png")


def _line(arm: str, row: dict[str, Any]) -> str:
    robust = row["accuracy_robust"]
    cells = [
        arm,
        f"{statistics.fmean(row['accuracy_clean']):.3f}",
        f"**{statistics.fmean(robust):.3f}**",
        ", ".join(f"{value:.3f}" for value in robust),
        " / ".join(f"{statistics.fmean(row[f'embedding_loss_{kind}']):.2f}" for kind in ("clean", "adversarial")),
        "–" if row["forward_passes"] is None else f"{row['forward_passes']:.1f}",
        "–" if row["stored_bytes"] is None else f"{row['stored_bytes'] / 1e6:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _error(row: dict[str, Any]) -> float:
    """Binomial standard error of the mean accuracy over all images of all seeds."""
    rate = statistics.fmean(row["accuracy_robust"])
    return math.sqrt(rate * (1 - rate) / row["images"])


def _plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Robust accuracy against compute and against bytes."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    axes[0].set(xlabel="forward passes a group and step", ylabel="robust accuracy, %", xscale="log")
    axes[0].set_xticks([3, 6, 12, 25, 50], labels=["3", "6", "12", "25", "50"])
    axes[0].minorticks_off()
    axes[1].set(xlabel="stored MB that the arm reads")
    for number, (arm, row) in enumerate(rows.items()):
        mean, error = 100 * statistics.fmean(row["accuracy_robust"]), 100 * _error(row)
        style = {"fmt": "os^vD"[number // 10], "color": f"C{number % 10}", "capsize": 3}
        for axis, value in zip(axes, (row["forward_passes"], row["stored_bytes"]), strict=True):
            if value is not None:
                scaled = value / 1e6 if axis is axes[1] else value
                axis.errorbar(scaled, mean, error, label=arm if axis is axes[0] else None, **style)
            elif row["forward_passes"] is None:
                axis.axhline(mean, color="grey", linewidth=1)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
