"""The stages of the experiment, which call the functions of the commands; finished parts are skipped.

    WORK/images/, images.json     the drawn images
    WORK/artifacts/NAME           the attacked members, and the artifacts merged from them
    WORK/runs/ARM                 training runs
    WORK/evaluations/ARM          captions and VQA of an arm
    WORK/results.json, .md        the table

Any number of processes, on machines that share WORK, may run the same command: one makes the artifacts while the
others wait, then each process takes arms that no other is running.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from filelock import FileLock, Timeout

from datamerge.encoders import parse_spec, pick_device
from datamerge.evaluation.llava.captions import evaluate_captions
from datamerge.evaluation.llava.coco import read_captions, read_questions
from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
from datamerge.evaluation.llava.evaluate import check_memory
from datamerge.evaluation.llava.model import count_parameters
from datamerge.evaluation.llava.vqa import evaluate_vqa
from datamerge.evaluation.reports import write_reports
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.tables import RESULTS
from datamerge.runtime import load_settings
from datamerge.sources import Source, open_source
from experiments.paper.settings import COLUMNS, MEMBERS, Data, Study
from merge_service import MergeConfig, merge
from storage_schemas import ConfigError, DatamergeError, Location, open_artifact
from storage_schemas.operations.remerge import Remerge, remerge
from storage_schemas.schema.run import BASELINE
from trainer import TrainConfig, train

DRAWN = "images.json"


@dataclass(frozen=True)
class Experiment:
    """The experiment of a settings file, in a work folder.

    Attributes:
        study: the settings.
        data: locations of images, models and questions.
        work: absolute path of the folder for all output.
    """

    study: Study
    data: Data
    work: Path

    def check_settings(self) -> None:
        """Raise ConfigError if a command would refuse its settings."""
        self.merge_config()
        for name in self.study.arms:
            self.train_config(name)
        self.captions_config(BASELINE)
        self.vqa_config(BASELINE)

    def problems(self) -> list[str]:
        """Missing requirements of all stages, one line each, before hours of work are spent."""
        sample = (int(self.study.evaluate["sample"]), int(self.study.evaluate.get("sample_seed", 42)))
        data = self.data
        checks: list[Callable[[], object]] = [
            lambda: parse_spec(data.encoder),
            self._source,
            lambda: read_captions(data.coco_captions, data.coco_images, "test", *sample),
            lambda: read_questions(data.vqa_questions, data.vqa_annotations, data.vqa_images, *sample),
            lambda: count_parameters(data.llava),
        ]
        found = []
        for check in checks:
            try:
                check()
            except DatamergeError as error:
                found.append(str(error))
        return found

    def check_memory(self) -> None:
        """Raise ConfigError if this machine has too little memory for the evaluation, the last stage."""
        config = self.captions_config(BASELINE)
        check_memory(config, pick_device(config.device))

    def run(self) -> list[str]:
        """Run the unfinished parts; returns the arms that other processes are running."""
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / "artifacts.lock"):
            self.artifacts()
        taken = []
        for name in (BASELINE, *self.study.arms):
            with _unless_taken(self.work / f"{_folder(name)}.lock") as mine:
                if mine:
                    self.measure(name)
                else:
                    taken.append(name)
        return taken

    def artifacts(self) -> None:
        """Draw images, attack them once, and merge the members in every way that an arm needs."""
        self.draw()
        merge(self.merge_config())
        members = open_artifact(self._artifact(MEMBERS))
        for name, wanted in self.study.remerge.items():
            remerge(members, Location(self._artifact(name)), Remerge(**wanted.model_dump(), keep_members=False))

    def measure(self, name: str) -> None:
        """Train an arm if it is not the baseline, and evaluate it."""
        if name != BASELINE:
            train(self.train_config(name))
        output = str(self._evaluation(name))
        write_reports(output, "captions", evaluate_captions(self.captions_config(name)))
        write_reports(output, "vqa", evaluate_vqa(self.vqa_config(name)))
        click.echo(f"{name}: " + ", ".join(f"{column} {cell}" for column, cell in _cells(self.scores(name)).items()))

    def scores(self, name: str) -> dict[str, dict[str, Any]]:
        """Results of an arm: value, error, count and warnings of each column; empty if there are none."""
        file = self._evaluation(name) / RESULTS
        if not file.is_file():
            return {}
        results = [ArmResult.model_validate(entry) for entry in json.loads(file.read_bytes())["arms"]]
        return {
            score.name: {**score.model_dump(exclude={"name"}), "warnings": result.warnings}
            for result in results
            for score in result.scores
        }

    def report(self, command: str, commit: str) -> str:
        """Write results.json and results.md for the finished arms; returns the text of results.md."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        rows = {name: self.scores(name) for name in (BASELINE, *self.study.arms)}
        facts = {"command": command, "commit": commit, "hardware": gpu, "rows": rows}
        lines = [f"`{command}`, commit {commit}, {gpu}. Ours ± standard error over images (paper).", ""]
        lines += [f"| arm | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
        for name, found in rows.items():
            published = self.study.published.get(name)
            paper = [f"{value:.1f}" for value in published] if published else ["–"] * len(COLUMNS)
            cells = [f"{ours} ({theirs})" for ours, theirs in zip(_cells(found).values(), paper, strict=True)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        text = "\n".join(lines) + "\n"
        folder = Location(self.work)
        folder.write("results.json", json.dumps(facts, indent=1).encode() + b"\n")
        folder.write("results.md", text.encode())
        return text

    def merge_config(self) -> MergeConfig:
        """Settings of the attack, which all arms share."""
        fixed = {
            "source": str(self.work / "images"),
            "artifact": self._artifact(MEMBERS),
            "encoder": self.data.encoder,
            "keep_members": True,
        }
        return load_settings(MergeConfig, None, _joined("merge", self.study.merge, fixed))

    def train_config(self, name: str) -> TrainConfig:
        """Settings of an arm's training."""
        arm = self.study.arms[name]
        fixed = {
            "artifact": self._artifact(arm.artifact),
            "run": str(self._run(name)),
            "arm": arm.arm,
            "members": arm.members,
        }
        return load_settings(TrainConfig, None, _joined("train", self.study.train, fixed))

    def captions_config(self, name: str) -> CaptionsConfig:
        """Settings of an arm's captions."""
        files = {"data": self.data.coco_captions, "images": self.data.coco_images}
        return load_settings(CaptionsConfig, None, {**self._evaluate_settings(name), **files})

    def vqa_config(self, name: str) -> VqaConfig:
        """Settings of an arm's answers."""
        files = {
            "data": self.data.vqa_questions,
            "annotations": self.data.vqa_annotations,
            "images": self.data.vqa_images,
        }
        return load_settings(VqaConfig, None, {**self._evaluate_settings(name), **files})

    def _evaluate_settings(self, name: str) -> dict[str, Any]:
        run = self.data.encoder if name == BASELINE else str(self._run(name))
        fixed = {"runs": [run], "llava": self.data.llava, "output": str(self._evaluation(name))}
        return _joined("evaluate", self.study.evaluate, fixed)

    def draw(self) -> None:
        """Copy randomly drawn images to attack; the first images of a sorted folder would cover only few classes."""
        wanted = {"images": self.data.images, "count": self.study.groups, "seed": self.study.draw.seed}
        folder, partial, record = self.work / "images", self.work / "images.partial", self.work / DRAWN
        if folder.is_dir() and record.is_file():
            found = json.loads(record.read_bytes())
            if found != wanted:
                raise ConfigError(f"{folder} was drawn with {found}, now with {wanted}; choose another --work")
            return
        source = self._source()
        generator = np.random.default_rng(np.random.SeedSequence([self.study.draw.seed]))
        chosen = generator.choice(len(source.samples), self.study.groups, replace=False)
        shutil.rmtree(partial, ignore_errors=True)
        for sample in (source.samples[position] for position in sorted(chosen.tolist())):
            target = partial / sample.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(self.data.images) / sample.name, target)
        Location(self.work).write(DRAWN, json.dumps(wanted).encode())
        partial.rename(folder)

    def _source(self) -> Source:
        """The source of all images, of which there must be at least one for each group."""
        source = open_source(self.data.images)
        if source.kind != "image_folder" or len(source.samples) < self.study.groups:
            raise ConfigError(
                f"data.images: expected a folder of at least {self.study.groups:,} images, one for each group that "
                f"training takes, found {source.kind} with {len(source.samples):,} in {self.data.images}"
            )
        return source

    def _artifact(self, name: str) -> str:
        return str(self.work / "artifacts" / name)

    def _run(self, name: str) -> Path:
        return self.work / "runs" / _folder(name)

    def _evaluation(self, name: str) -> Path:
        return self.work / "evaluations" / _folder(name)


@contextmanager
def _unless_taken(path: Path) -> Iterator[bool]:
    """Try to take a lock for the block; False if another process holds it."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _joined(table: str, settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    both = sorted(settings.keys() & fixed.keys())
    if both:
        raise ConfigError(f"{table}.{both[0]}: the experiment sets it itself; drop it")
    return {**settings, **fixed}


def _folder(name: str) -> str:
    return "without-AT" if name == BASELINE else name


def _cells(scores: dict[str, dict[str, Any]]) -> dict[str, str]:
    cells = {}
    for column in COLUMNS:
        score = scores.get(column)
        error = "" if score is None or score["error"] is None else f" ± {score['error']:.1f}"
        cells[column] = "–" if score is None else f"{score['value']:.1f}{error}"
    return cells
