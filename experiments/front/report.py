"""Write the figure and tables of the front from its results files.

python -m experiments.front.report experiments/front/results-*.json
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

HEADER = (
    "| passes | arm | updates | rate | clean | robust | by seed | to FARE, ± over seeds | CPU s a run |\n"
    "|---|---|---|---|---|---|---|---|---|"
)
REFERENCE = "FARE, PGD-10"
TITLES = {"cifar10": "CIFAR-10"}
LONGER = "-longer"  # end of the names of results whose points belong in the figure's column of another file


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: Sequence[Path]) -> None:
    """Write results-NAME.md beside each of RESULTS, and front.png for all of them."""
    found = {path.stem.removeprefix("results-"): json.loads(path.read_text()) for path in results}
    for path, facts in zip(results, found.values(), strict=True):
        path.with_suffix(".md").write_text(table(facts))
    for name in [name for name in found if name.endswith(LONGER)]:
        found[name.removesuffix(LONGER)]["rows"] |= found.pop(name)["rows"]
    figure(found, results[0].with_name("front.png"))


def points(facts: dict[str, Any]) -> dict[tuple[int, str], dict[str, Any]]:
    """Rows by (passes, arm), the cheapest budget first."""
    named = {(row["passes"], name.split(", " + str(row["passes"]))[0]): row for name, row in facts["rows"].items()}
    return dict(sorted(named.items(), key=lambda item: item[0][0]))


def table(facts: dict[str, Any]) -> str:
    """Markdown table with a row for each finished point."""
    rows = points(facts)
    before = facts["baseline"]
    lines = [
        f"`{facts['command']}`, {facts['hardware']}\n",
        HEADER,
        f"| 0 | before | – | – | {_mean(before, 'clean')} | {_mean(before, 'robust')} | {_seeds(before)} | | – |",
    ]
    for (passes, arm), row in rows.items():
        seconds = f"{statistics.fmean(row['cpu_seconds']):.0f}" if row["cpu_seconds"] else "–"
        to_fare, steps = _difference(row, rows.get((passes, REFERENCE))), int(passes / row["passes_a_step"])
        lines.append(
            f"| {passes:,} | {arm} | {steps:,} | {row['rate']:g} | {_mean(row, 'clean')} | {_mean(row, 'robust')} "
            f"| {_seeds(row)} | {to_fare} | {seconds} |"
        )
    return "\n".join(lines) + "\n"


def figure(found: dict[str, dict[str, Any]], target: Path) -> None:
    """Plot robust and clean accuracy against passes, with a column for each results file."""
    plot, axes = plt.subplots(2, len(found), figsize=(3.6 * len(found), 6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(arm for facts in found.values() for _, arm in points(facts)))
    for column, (name, facts) in enumerate(found.items()):
        rows = points(facts)
        for kind, axis in zip(("robust", "clean"), axes[:, column], strict=True):
            for number, arm in enumerate(names):
                own = {passes: row for (passes, other), row in rows.items() if other == arm}
                values = [row[f"accuracy_{kind}"] for row in own.values()]
                axis.errorbar(
                    list(own),
                    [statistics.fmean(value) for value in values],
                    [statistics.stdev(value) if len(value) > 1 else 0 for value in values],
                    marker="o",
                    capsize=2,
                    color=f"C{number}",
                    label=arm,
                )
            axis.axhline(statistics.fmean(facts["baseline"][f"accuracy_{kind}"]), color="grey", linestyle=":")
            axis.set(xscale="log", ylabel=f"{kind} accuracy" if not column else None)
        data, _, epsilon = name.partition("-")
        axes[0, column].set_title(f"{TITLES.get(data, data)}, ε = {epsilon}/255")
        axes[1, column].set_xlabel("forward passes per position of the batch")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside lower center", ncols=4)
    plot.savefig(target, dpi=110)
    plt.close(plot)


def _mean(row: dict[str, Any], kind: str) -> str:
    return f"{statistics.fmean(row[f'accuracy_{kind}']):.3f}"


def _seeds(row: dict[str, Any]) -> str:
    return ", ".join(f"{value:.3f}" for value in row["accuracy_robust"])


def _difference(row: dict[str, Any], reference: dict[str, Any] | None) -> str:
    """Mean difference in robust accuracy ± its standard error over seeds, paired, since arms share images."""
    if reference is None or row is reference or row["seeds"] != reference["seeds"]:
        return ""
    pairs = zip(row["accuracy_robust"], reference["accuracy_robust"], strict=True)
    different = [one - other for one, other in pairs]
    spread = statistics.stdev(different) / math.sqrt(len(different)) if len(different) > 1 else math.nan
    return f"{statistics.fmean(different):+.3f} ± {spread:.3f}"


if __name__ == "__main__":
    main()
