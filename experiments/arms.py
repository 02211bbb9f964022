"""Run the arms of a settings file: artifacts, training runs and evaluations, seed by seed, then table and plot.

    python -m experiments.arms experiments/cifar10/epsilon-2.toml --data "$DATAMERGE_DATA" --work cifar10

All steps call the same functions as the commands. Finished parts are kept in --work and skipped later. Once the
artifacts exist (--seeds "" makes only them), several processes may share --work if each has its own --seeds.
"""

from __future__ import annotations

import importlib
import json
import platform
import shutil
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch

from datamerge.evaluation import ArmResult, EvaluateConfig, Score, evaluate
from datamerge.runtime.checkout import commit
from experiments.arms_report import report
from experiments.facts import array_bytes
from merge_service import MergeConfig, merge
from storage_schemas import Location, open_artifact
from storage_schemas.operations.combine import plan_combination
from storage_schemas.operations.remerge import Remerge, remerge
from storage_schemas.schema.run import BASELINE, SUMMARY
from trainer import TrainConfig, train
from trainer.arms import ARMS

PUBLISHER = 1000  # seed of the run that makes the `published` artifacts


@dataclass(frozen=True)
class Prepared:
    """Data and encoder of an experiment.

    Attributes:
        train: source of the training images, which are attacked.
        test: seed → source of the test images.
        encoder: spec of the encoder before fine-tuning.
        head: file of the class head on its embeddings.
    """

    train: str
    test: Callable[[int], str]
    encoder: str
    head: str


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command SETTINGS, --data, --work, --seeds and --only."""
    for add in (
        click.option("--only", multiple=True, help="Run these arms only."),
        click.option("--seeds", default="0,1,2", show_default=True, help="Seeds to run; finished ones are skipped."),
        click.option(
            "--work", required=True, type=click.Path(file_okay=False, path_type=Path), help="Artifacts and runs."
        ),
        click.option("--data", required=True, type=click.Path(exists=True, file_okay=False, path_type=Path)),
        click.argument("settings", type=click.Path(exists=True, dir_okay=False, path_type=Path)),
    ):
        command = add(command)
    return command


@click.command()
@settings_options
def main(settings: Path, data: Path, work: Path, seeds: str, only: tuple[str, ...]) -> None:
    """Run the unfinished parts of the arms in SETTINGS, then write results beside it."""
    torch.set_num_threads(1)
    experiment = ArmsExperiment(tomllib.loads(settings.read_text()), data, work, settings.stem)
    experiment.artifacts()
    names = [name for name in (BASELINE, *experiment.settings["arms"]) if not only or name in only]
    for seed in (int(text) for text in seeds.split(",") if text):
        for name in names:
            found = experiment.measured(name, seed)
            click.echo(f"{settings.stem}: seed {seed}, {name}: {found['accuracy_robust']:.3f}")
    rows = {name: experiment.row(name) for name in (BASELINE, *experiment.settings["arms"])}
    facts = {
        "command": f"python -m experiments.arms {'/'.join(settings.parts[-3:])}",
        "commit": commit(),
        "hardware": f"{platform.machine()} CPU, 1 thread",
        "rows": {name: row for name, row in rows.items() if row},
    }
    report(facts, settings)


class ArmsExperiment:
    """The experiment of a settings file, in a work folder."""

    def __init__(self, settings: dict[str, Any], data: Path, work: Path, name: str) -> None:
        self.settings = settings
        module, _, function = settings["prepare"].partition(":")
        self.prepared: Prepared = getattr(importlib.import_module(module), function)(data, work)
        self._work = work / name

    def artifacts(self) -> None:
        """Attack once, then merge the members in every way that an arm needs.

        `published` artifacts hold the accumulated rounds of a run with the seed `PUBLISHER`, which no arm uses.
        """
        merge(self._merge_config(self.artifact("members"), **self.settings["merge"]))
        for name, wanted in self.settings.get("published", {}).items():
            if not (Path(self.artifact(name)) / "manifest.json").exists():
                run = self._work / "runs" / f"{name}-publisher"
                self._rounds(run, PUBLISHER, **wanted, again=True)
                last = wanted["rounds"] - 1
                shutil.copytree(f"{run}-artifacts/0-{last}", self.artifact(name))
        for name, wanted in self.settings["remerge"].items():
            source = self.artifact(wanted.get("source", "members"))
            settings = Remerge(**{key: value for key, value in wanted.items() if key != "source"})
            remerge(open_artifact(source), Location(self.artifact(name)), settings)

    def artifact(self, name: str) -> str:
        """Folder of the artifact with this name in the settings."""
        return str(self._work / "artifacts" / name)

    def measured(self, name: str, seed: int) -> dict[str, Any]:
        """The evaluation of an arm and seed; trains and evaluates if that is not done yet.

        Raises:
            click.ClickException: the stored evaluation has other settings.
        """
        done = self._evaluation(name, seed)
        if not done.exists():
            trained = self.prepared.encoder if name == BASELINE else self._train(name, seed)
            (found,) = evaluate(
                EvaluateConfig(
                    runs=[trained],
                    data=self.prepared.test(seed),
                    head=self.prepared.head,
                    original=self.prepared.encoder,
                    seed=seed,
                    threads=1,
                    **self.settings["evaluate"],
                )
            )
            facts = {"settings": self._settings_of(name), "commit": commit(), "found": _figures(found)}
            Location(done.parent).write(done.name, json.dumps(facts).encode())
        return self._read(done, name)

    def trained(self, name: str, seed: int) -> str | None:
        """The trained encoder as `evaluate` takes it: folder of the finished run, or spec; None if unfinished."""
        if name == BASELINE:
            return self.prepared.encoder
        run = self._run(name, seed)
        return str(run) if (run / SUMMARY).exists() else None

    def row(self, name: str) -> dict[str, Any] | None:
        """Results of an arm over its finished seeds; None without one."""
        prefix = f"{_folder(name)}-"
        files = {
            int(file.stem.removeprefix(prefix)): file
            for file in self._work.glob(f"evaluations/{prefix}*.json")
            if file.stem.removeprefix(prefix).isdecimal()
        }
        seeds = sorted(files)
        if not seeds:
            return None
        found = [self._read(files[seed], name) for seed in seeds]
        arm = dict(self.settings["arms"].get(name, {}))
        cpu = [file for seed in seeds if (file := self._run(name, seed) / "cpu-seconds").exists()]
        return {
            "arm": arm,
            "seeds": seeds,
            "commits": sorted({json.loads(files[seed].read_bytes())["commit"] for seed in seeds}),
            "images": sum(row["labelled"] for row in found),
            **{
                key: [row[key] for row in found]
                for key in (
                    "accuracy_clean",
                    "accuracy_robust",
                    "embedding_loss_clean",
                    "embedding_loss_adversarial",
                )
            },
            "cpu_seconds": [float(file.read_text()) for file in cpu],
            "stored_bytes": self._stored_bytes(arm),
            "forward_passes": self._forward_passes(arm),
        }

    def _settings_of(self, name: str) -> dict[str, Any]:
        """Settings that determine the results of an arm, apart from the seed."""
        used = {key: self.settings[key] for key in ("merge", "train", "evaluate")}
        return used | {"arm": self.settings["arms"].get(name, {})}

    def _read(self, done: Path, name: str) -> dict[str, Any]:
        facts = json.loads(done.read_bytes())
        if facts["settings"] != self._settings_of(name):
            raise click.ClickException(
                f"{done}: expected the settings {json.dumps(self._settings_of(name))}, found "
                f"{json.dumps(facts['settings'])}; choose another --work, or remove this file and the run of its name"
            )
        found: dict[str, Any] = facts["found"]
        return found

    def _train(self, name: str, seed: int) -> str:
        arm = dict(self.settings["arms"][name])
        run = self._run(name, seed)
        started = time.process_time()
        if "rounds" in arm:
            run = self._rounds(run, seed, **arm)
        else:
            artifact = self.artifact(arm.pop("artifact"))
            train(self._train_config(artifact, run, seed, **arm))
        if not (run / "cpu-seconds").exists():
            (run / "cpu-seconds").write_text(f"{time.process_time() - started:.2f}")
        return str(run)

    def _rounds(self, run: Path, seed: int, rounds: int, arm: str, again: bool = False) -> Path:
        """In every round attack the current encoder, add the new members to the earlier ones, and train on all.

        Args:
            run: folder of the run; rounds get folders beside it.
            seed: seed of the run.
            rounds: number of rounds.
            arm: arm of the training runs.
            again: whether every round is a whole run from the original encoder; otherwise it continues the previous
                round for an equal share of a run.
        """
        encoder, parts = self.prepared.encoder, []
        shares = 1 if again else rounds
        for number in range(rounds):
            parts.append(f"{run}-artifacts/{number}")
            wanted = self.settings["merge"] | {"members": 1, "seed": 1000 * (seed + 1) + number}
            merge(self._merge_config(parts[-1], **wanted, encoder=encoder, target_encoder=self.prepared.encoder))
            artifact = parts[0]
            if number:
                artifact = f"{run}-artifacts/0-{number}"
                plan_combination([open_artifact(part) for part in parts]).write(Location(artifact))
            folder = run if number == rounds - 1 else Path(f"{run}-rounds") / str(number)
            start = self.prepared.encoder if again else encoder
            config = self._train_config(artifact, folder, 1000 * seed + number, arm=arm, encoder=start)
            shorter = {name: self.settings["train"][name] // shares for name in ("steps", "warmup_steps")}
            config = config.model_copy(update=shorter)
            encoder = train(config).encoder
        return run

    def _merge_config(self, artifact: str, **wanted: Any) -> MergeConfig:
        wanted = {"encoder": self.prepared.encoder, **wanted}
        return MergeConfig(source=self.prepared.train, artifact=artifact, keep_members=True, **wanted)

    def _train_config(self, artifact: str, run: Path, seed: int, **arm: Any) -> TrainConfig:
        shared = {"threads": 1, "checkpoint_every": 10**6, "encoder": self.prepared.encoder, **self.settings["train"]}
        return TrainConfig.model_validate(shared | {"artifact": artifact, "run": str(run), "seed": seed} | arm)

    def _evaluation(self, name: str, seed: int) -> Path:
        return self._work / "evaluations" / f"{_folder(name)}-{seed}.json"

    def _run(self, name: str, seed: int) -> Path:
        return self._work / "runs" / f"{_folder(name)}-{seed}"

    def _stored_bytes(self, arm: dict[str, Any]) -> int | None:
        """Compressed bytes of the arrays that an arm reads; of the members, the share that it uses."""
        if "rounds" in arm:
            first = next(iter(sorted(self._work.glob("runs/*-artifacts/0"))), None)
            return None if first is None else arm["rounds"] * array_bytes(str(first), {"members"})
        if not arm:
            return None
        spec = ARMS[arm["arm"]]
        arrays = spec.arrays | ({"clean"} if spec.starts_clean or arm.get("refine_steps") else set())
        stored = array_bytes(self.artifact(arm["artifact"]), arrays)
        taken = arm.get("members")
        return stored if taken is None else stored * taken // int(self.settings["merge"]["members"])

    def _forward_passes(self, arm: dict[str, Any]) -> float | None:
        """Cost of a run in forward passes per group and step, including attacks made for this run alone."""
        if not arm:
            return None
        step = ARMS[arm["arm"]].forward_passes(
            arm.get("estimator"),
            samples=arm.get("samples", 1),
            members=int(arm.get("members") or self.settings["merge"]["members"]),
            refine_steps=arm.get("refine_steps", 0),
        )
        if "rounds" not in arm:
            return step
        images = int(arm["rounds"]) * int(self.settings["merge"]["limit_first"])
        seen = int(self.settings["train"]["steps"]) * int(self.settings["train"]["batch_size"])
        # An attack step costs 2 passes (PAPER §4); the target and the final loss cost one forward pass each.
        return step + (2.0 * int(self.settings["merge"]["steps"]) + 2) * images / seen


def _figures(found: ArmResult) -> dict[str, Any]:
    """Figures of an evaluation for the table, with the encoder's hash; accuracies are fractions."""
    clean, robust = found.score("accuracy clean"), found.score("accuracy robust")
    return {
        "run": found.run,
        "encoder_sha256": found.encoder_sha256,
        "labelled": clean.count,
        "accuracy_clean": _fraction(clean),
        "accuracy_robust": _fraction(robust),
        "embedding_loss_clean": found.score("loss clean").value,
        "embedding_loss_adversarial": found.score("loss adv.").value,
    }


def _fraction(score: Score) -> float:
    """Hits over trials; percents over 100 would differ in the last digit."""
    return round(score.value * score.count / 100) / score.count


def _folder(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


if __name__ == "__main__":
    main()
