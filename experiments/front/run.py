"""Robustness and clean accuracy against compute: arms, budgets and rates of a settings file.

    python -m experiments.front.run experiments/front/cifar10-2.toml --data "$DATAMERGE_DATA" --work front

A budget is the cost of a whole run per item of a batch, in forward passes of one image; a backward pass counts as
two. An arm with cheaper updates makes more of them. For every arm and budget each of the same learning rates is tried
once, with a seed and images that are used for nothing else; the rate with the largest sum of clean and robust
accuracy is run with the other seeds. All steps call the functions of the commands. Finished parts are kept in --work
and skipped later, so several processes may share --work if each has its own --only.
"""

from __future__ import annotations

import json
import platform
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch

from datamerge.runtime.checkout import commit
from experiments.arms import ArmsExperiment, settings_options
from storage_schemas.schema.run import BASELINE
from trainer.arms import ARMS

TUNING_SEED = 19
WARMUP = 0.075  # fraction of the steps, as in experiments/cifar10


class Point(NamedTuple):
    """One run: an arm, its budget in passes, and its peak learning rate."""

    arm: str
    passes: int
    rate: float

    @property
    def name(self) -> str:
        """Name in the work folder."""
        return f"{self.arm}, {self.passes} passes, rate {self.rate:g}"


class Front:
    """The points of a settings file."""

    def __init__(self, settings: dict[str, Any], data: Path, work: Path, name: str) -> None:
        self.settings = settings
        tuning = {**settings, "evaluate": {**settings["evaluate"], **settings["tuning"]}}
        arms = {point.name: self._run_of(point) for point in self.points()}
        self.measuring = ArmsExperiment({**settings, "arms": arms}, data, work, name)
        self.tuning = ArmsExperiment({**tuning, "arms": arms}, data, work, f"{name}-tuning")

    def points(self) -> Iterator[Point]:
        """All points to try."""
        for arm, wanted in self.settings["arms"].items():
            for passes in wanted.get("passes", self.settings["passes"]):
                for rate in self.settings.get("rates_at", {}).get(str(passes), self.settings["rates"]):
                    yield Point(arm, passes, rate)

    def passes_a_step(self, arm: str) -> float:
        """Cost of one update in forward passes per group."""
        wanted = self._settings_of(arm)
        return ARMS[wanted["arm"]].forward_passes(
            wanted.get("estimator"),
            samples=wanted.get("samples", 1),
            members=wanted.get("members", 1),
            refine_steps=wanted.get("refine_steps", 0),
            clean_term=bool(wanted.get("clean_weight")),
        )

    def is_tuned(self, arm: str, passes: int) -> bool:
        """Whether every rate of an arm and budget was tried."""
        tried = [point for point in self.points() if (point.arm, point.passes) == (arm, passes)]
        return all(self.tuning.row(point.name) for point in tried)

    def best(self, arm: str, passes: int) -> Point:
        """The point of an arm and budget with the best rate on the tuning images."""
        tried = [point for point in self.points() if (point.arm, point.passes) == (arm, passes)]
        if len(tried) == 1:
            return tried[0]
        scores = [self._score(self.tuning.measured(point.name, TUNING_SEED)) for point in tried]
        return tried[scores.index(max(scores))]

    def measured(self, point: Point, seed: int) -> dict[str, Any]:
        """The evaluation of a point and seed; see `ArmsExperiment.measured`."""
        return self.measuring.measured(point.name, seed)

    def row(self, point: Point) -> dict[str, Any] | None:
        """Results of a point over its finished seeds; None without one."""
        found = self.measuring.row(point.name)
        if found is None:
            return None
        tuned = {
            other.rate: self.tuning.measured(other.name, TUNING_SEED)
            for other in self.points()
            if other[:2] == point[:2] and self.tuning.trained(other.name, TUNING_SEED)
        }
        return {
            **found,
            "passes": point.passes,
            "passes_a_step": self.passes_a_step(point.arm),
            "rate": point.rate,
            "tuning": {f"{rate:g}": [row["accuracy_clean"], row["accuracy_robust"]] for rate, row in tuned.items()},
        }

    @staticmethod
    def _score(found: dict[str, Any]) -> float:
        return float(found["accuracy_clean"] + found["accuracy_robust"])

    def _settings_of(self, arm: str) -> dict[str, Any]:
        return {name: value for name, value in self.settings["arms"][arm].items() if name != "passes"}

    def _run_of(self, point: Point) -> dict[str, Any]:
        steps = int(point.passes / self.passes_a_step(point.arm))
        run = {"steps": steps, "warmup_steps": int(WARMUP * steps), "learning_rate": point.rate}
        return {"artifact": "members", **self._settings_of(point.arm), **run}


@click.command()
@settings_options
@click.option("--passes", multiple=True, type=int, help="Run these budgets only.")
def main(settings: Path, data: Path, work: Path, seeds: str, only: tuple[str, ...], passes: tuple[int, ...]) -> None:
    """Run the unfinished parts of the front in SETTINGS, then write results beside it."""
    torch.set_num_threads(1)
    front = Front(tomllib.loads(settings.read_text()), data, work, settings.stem)
    front.measuring.artifacts()
    for name in ("tuning", "measuring"):  # both train on the same artifacts
        folder = work / {"tuning": f"{settings.stem}-tuning", "measuring": settings.stem}[name] / "artifacts"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.symlink_to((work / settings.stem / "artifacts").resolve())
    wanted = [int(text) for text in seeds.split(",") if text]
    for seed in wanted:
        front.measuring.measured(BASELINE, seed)
    budgets = sorted({point.passes for point in front.points()})
    for budget in budgets:
        for arm in front.settings["arms"]:
            if (only and arm not in only) or (passes and budget not in passes):
                continue
            if not any(point[:2] == (arm, budget) for point in front.points()):
                continue
            best = front.best(arm, budget)
            for seed in wanted:
                found = front.measured(best, seed)
                click.echo(
                    f"{settings.stem}, {best.name}, seed {seed}: clean {found['accuracy_clean']:.3f}, robust "
                    f"{found['accuracy_robust']:.3f}"
                )
    write(front, settings)


def write(front: Front, settings: Path) -> None:
    """Write the results file with all finished points."""
    pairs = dict.fromkeys(point[:2] for point in front.points())
    best = [front.best(*pair) for pair in pairs if front.is_tuned(*pair)]
    rows = {point.name: row for point in best if (row := front.row(point))}
    facts = {
        "command": f"python -m experiments.front.run {'/'.join(settings.parts[-3:])}",
        "commit": commit(),
        "hardware": f"{platform.machine()} CPU, 1 thread",
        "baseline": front.measuring.row(BASELINE),
        "rows": rows,
    }
    settings.with_name(f"results-{settings.stem}.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
