"""Does merging save training passes? Merged views of an image, or clusters of a class, against plain training.

    python -m experiments.views.run --data "$DATAMERGE_DATA" --work views

A budget is the cost of a whole run per item of a batch, in forward passes of one image; a backward pass counts as
two. Every arm tries the same learning rates at every budget, with a seed and images that are used for nothing else;
the best rate runs with the other seeds. Finished parts are kept in --work and skipped later, so several processes may
share --work if each has its own --only. Writes all finished results to results.json and plot.png beside this file.
"""

from __future__ import annotations

import json
import statistics
import tomllib
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import torch

from experiments.facts import write_accuracies
from experiments.views.gradients import compared
from experiments.views.study import RANDOM, TUNING_SEED, Study

mpl.use("Agg")  # no display needed

from matplotlib import pyplot as plt

HERE = Path(__file__).parent
SETTINGS: dict[str, Any] = tomllib.loads((HERE / "settings.toml").read_text())
PARTS: dict[str, int] = SETTINGS["parts"]  # largest budget of each part


@click.command()
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--work", default="views", show_default=True, type=click.Path(path_type=Path))
@click.option("--seeds", default=3, show_default=True)
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Run these parts only.")
def main(data: Path, work: Path, seeds: int, only: tuple[str, ...]) -> None:
    """Run the unfinished parts, then write the results."""
    torch.set_num_threads(1)
    studies = {part: Study(SETTINGS, data, work, *part.split("/")) for part in PARTS}
    for part in only or PARTS:
        for budget, arm in _points(part, studies[part]):
            row = _row(studies[part], arm, budget, seeds)
            cells = ", ".join(
                f"{name} {row[name]['mean']} ± {row[name]['sd']}" for name in ("clean", "views") if name in row
            )
            click.echo(f"{part}, {arm}, {budget['passes']} passes, rate {row['rate']:g}: {cells}")
        if studies[part].kind != "clusters":
            _noise(studies[part], work / part / "gradients.json")
    results: dict[str, Any] = {part: _finished(part, study, work, seeds) for part, study in studies.items()}
    write_accuracies(HERE, f"experiments.views.run --seeds {seeds}", seeds, results)
    _plot(results)


def _points(part: str, study: Study) -> list[tuple[dict[str, Any], str]]:
    """Budgets and arms of a part, the cheap ones first."""
    budgets = [budget for budget in SETTINGS["budgets"] if budget["passes"] <= PARTS[part]]
    return [(budget, arm) for budget in budgets for arm in study.arms]


def _row(study: Study, arm: str, budget: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Accuracies of an arm at a budget, over the seeds."""
    passes, rate = budget["passes"], study.best_rate(arm, budget["passes"], budget["rates"])
    found = [study.measured(arm, passes, rate, seed) for seed in range(seeds)]
    row: dict[str, Any] = {"steps": int(passes / study.passes_a_step(arm)), "rate": rate}
    for measure in found[0]:
        values = [one[measure] for one in found]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row[measure] = {"mean": round(statistics.fmean(values), 2), "sd": round(spread, 2), "values": values}
    return row


def _finished(part: str, study: Study, work: Path, seeds: int) -> dict[str, Any]:
    """Results of a part: the rows with all runs finished, and the noise of its gradients."""
    arms: dict[str, dict[str, Any]] = {}
    for budget, arm in _points(part, study):
        passes, rates = budget["passes"], budget["rates"]
        if not all(study.finished(arm, passes, rate, TUNING_SEED) for rate in rates):
            continue
        rate = study.best_rate(arm, passes, rates)
        if all(study.finished(arm, passes, rate, seed) for seed in range(seeds)):
            arms.setdefault(arm, {})[str(passes)] = _row(study, arm, budget, seeds)
    noise = work / part / "gradients.json"
    return {"arms": arms, "gradients": json.loads(noise.read_text()) if noise.exists() else {}}


def _noise(study: Study, kept: Path) -> None:
    """Compare gradients at the initial weights, and at those after training on random views at some budgets."""
    if kept.exists():
        return
    facts = {}
    for passes in SETTINGS["gradients"]["after"]:
        rates = [budget["rates"] for budget in SETTINGS["budgets"] if budget["passes"] == passes]
        rate = study.best_rate(RANDOM, passes, rates[0]) if passes else 0.0
        facts[str(passes)] = compared(
            study, study.encoder(passes, rate, 0), SETTINGS["gradients"]["images"], SETTINGS["gradients"]["draws"]
        )
    kept.write_text(json.dumps(facts))


def _plot(results: dict[str, Any]) -> None:
    """Plot test accuracy against passes."""
    shown = {part: found["arms"] for part, found in results.items() if found["arms"]}
    figure, axes = plt.subplots(1, len(shown), figsize=(4.5 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, (part, arms) in zip(axes[0], shown.items(), strict=True):
        for arm, rows in arms.items():
            chosen = [row.get("views", row["clean"]) for row in rows.values()]
            means, spread = [row["mean"] for row in chosen], [row["sd"] for row in chosen]
            axis.errorbar([int(passes) for passes in rows], means, spread, marker="o", capsize=3, label=arm)
        of = "clean images" if part.endswith("clusters") else "views"
        axis.set(title=part, xscale="log", xlabel="passes a place", ylabel=f"accuracy on test {of}, %")
        axis.legend(fontsize="small")
    figure.savefig(HERE / "plot.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
