"""The results of all arms in a task of LLaVA: checks the memory, runs the passes, and computes the scores."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from datamerge.encoders import pick_device
from datamerge.evaluation.encoders_under_test import numerics
from datamerge.evaluation.llava.attack import plan_passes
from datamerge.evaluation.llava.cases import Case, Item
from datamerge.evaluation.llava.config import LlavaSettings
from datamerge.evaluation.llava.images import read_image
from datamerge.evaluation.llava.model import count_parameters
from datamerge.evaluation.llava.study import ArmStudy, Task
from datamerge.evaluation.results import ArmResult, Score, Training, mean_score
from datamerge.evaluation.tables import Results
from datamerge.runtime import Progress
from datamerge.runtime.messages import warn
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

# Bytes per parameter, and a rough allowance for the activations of one image.
FLOAT32, HALF = 4, 2
ROOM = 1.25
LARGE = 1_000_000_000
ANY_PIXELS = Preprocessing(shape=(3, 1, 1))


def evaluate_task(config: LlavaSettings, task: Task, title: str, warnings: Sequence[str]) -> Results:
    """Evaluate every arm on a task; one result per run, in the order given.

    Args:
        config: the settings.
        task: the questions and their scorer.
        title: name of the data set in the table's columns.
        warnings: reasons to distrust all scores.

    Raises:
        ConfigError: models or settings that do not go together, or too little memory.
        DatamergeError: an image that cannot be read, or a pass that does not fit the memory.
    """
    device = pick_device(config.device)
    check_memory(config, device)
    studies = [ArmStudy(config, task, run, device) for run in config.runs]
    shared = {
        **config.model_dump(mode="json", include={"llava", "image_size", "fit", "attack", "epsilon", "steps"}),
        "precision": None if config.precision == "float32" else config.precision,  # as in results of earlier releases
        "items": [item.key for item in task.items],
        "content_sha256": _content_sha256(task.items),
        "scorer": task.scorer,
    }
    for path in {item.image for item in task.items}:
        # Every image is decoded first, so that a broken one does not end hours of attacks.
        read_image(path, ANY_PIXELS, config.fit)
    for study in studies:
        study.claim(shared)
    passes = sum(len(plan_passes(len(item.references), task.targets, config.attack)) for item in task.items)
    results = Results()
    with numerics(config.threads, device), Progress(task.part, passes * len(studies), "passes") as progress:
        for study in studies:
            cases = study.measure(progress)
            results.append(_result(config, task, study, cases, title, warnings))
    return results


def _content_sha256(items: Sequence[Item]) -> str:
    """SHA-256 of the questions, answers and images, since other contents under the same keys are another study."""
    images = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {item.image for item in items}}
    facts = [
        [item.key, item.question, list(item.references), list(item.answers), images[item.image]] for item in items
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def check_memory(config: LlavaSettings, device: torch.device) -> None:
    """Check that the model fits the memory, before gigabytes of weights are read.

    Raises:
        ConfigError: it does not; names the memory that is needed and the memory that there is.
    """
    count = count_parameters(config.llava)
    per_parameter = FLOAT32 if config.attack or (config.half or "") == "float32" or device.type == "cpu" else HALF
    needed = count * per_parameter * ROOM
    size = f"{config.llava} has {count / 1e9:.1f} billion parameters and needs about {needed / 1e9:.0f} GB of memory"
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
        if there < needed:
            raise ConfigError(
                f"device: {size}, {device} has {there / 1e9:.0f} GB; use a larger GPU or a smaller model"
            )
        return
    if count > LARGE and config.device == "auto":
        raise ConfigError(
            f"device: expected a GPU, found none; {size} on one. `device=cpu` would need as much main "
            "memory and very long"
        )
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if there < needed:
        raise ConfigError(f"device: {size}, this machine has {there / 1e9:.0f} GB; use a smaller model")


def _result(
    config: LlavaSettings, task: Task, study: ArmStudy, cases: Sequence[Case], title: str, warnings: Sequence[str]
) -> ArmResult:
    clean = [case.clean_score for case in cases]
    scores: list[Score] = [mean_score(f"{title} clean", clean)]
    if config.attack:
        scores.append(mean_score(f"{title} adv.", [case.lowest[1] for case in cases]))
    passes = [found for case in cases for found in case.record.passes]
    failures = [found.failure for found in passes if found.failure is not None]
    found = list(warnings)
    if failures:
        found.append(f"{len(failures)} passes failed, e.g. {failures[0]}; the others still count")
    for message in found:
        warn(f"{study.run.arm}: {message}")
    saved = [(case, case.record.eight_bit) for case in cases if case.record.eight_bit is not None]
    details: dict[str, Any] = {
        "folder": str(study.folder.path),
        "pictures": [_picture(case) for case, _ in saved[: config.pictures]],
        "half": study.half,
        "lowest_by_pass": _count(cases),
    }
    if saved:
        details["eight_bit_mean"] = sum(stored.score for _, stored in saved) / len(saved)
        details["same_images_mean"] = sum(case.lowest[1] for case, _ in saved) / len(saved)
        details["eight_bit_images"] = len(saved)
    return ArmResult(
        part=task.part,
        run=study.run.name,
        arm=study.run.arm,
        encoder=study.run.encoder,
        encoder_sha256=study.tower_sha256,
        scores=scores,
        images=len(cases),
        seconds=round(sum(one.seconds for one in passes), 3),
        training=Training.of(study.run.summary),
        warnings=found,
        settings=config.model_dump(mode="json"),
        details=details,
    )


def _count(cases: Sequence[Case]) -> dict[str, int]:
    """Number of images whose lowest score each pass found."""
    names = [case.lowest[0].name for case in cases]
    return {name: names.count(name) for name in dict.fromkeys(names)}


def _picture(case: Case) -> dict[str, Any]:
    first, (lowest, score) = case.record.passes[0], case.lowest
    return {
        "clean": f"images/{case.item.key}-clean.png",
        "adversarial": f"images/{case.item.key}.png",
        "question": case.item.question,
        "reference": case.item.references[0],
        "before": first.answer,
        "score_before": first.score,
        "after": lowest.answer,
        "score_after": score,
    }
