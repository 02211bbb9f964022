"""Runs LLaVA on images with each vision encoder in turn, clean and under attack; one JSON file per image.

All images go through the passes in half precision before the model is loaded in float32 for the others. A file holds
the result of every finished pass, so that an interrupted evaluation continues with the next pass of each image.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ValidationError
from torch import Tensor

from datamerge.attacks import Precision
from datamerge.evaluation.llava.attack import CLEAN, Attempt, Pass, Stage, attack_answers, plan_passes
from datamerge.evaluation.llava.cases import Case, CaseRecord, EightBit, Item, PassRecord
from datamerge.evaluation.llava.config import LlavaSettings
from datamerge.evaluation.llava.images import read_image, round_inside
from datamerge.evaluation.llava.model import Arithmetic, Llava
from datamerge.evaluation.llava.vision_towers import identify_tower, read_tower_run
from datamerge.evaluation.pictures import to_png
from datamerge.evaluation.store import ArmFolder
from datamerge.runtime import Progress
from datamerge.runtime.memory import out_of_memory_advice
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.moments import LEVELS

STAGES: tuple[Stage, ...] = ("half", "float32")


@dataclass(frozen=True)
class Task:
    """The differences between captions and VQA.

    Attributes:
        part: captions or vqa.
        items: the images and their questions.
        new_tokens: largest number of tokens of an answer.
        targets: answers of the targeted passes.
        is_broken: whether an image with this score is not attacked any further.
        clean_up: extracts the answer from the generated text.
        score: from answers to their scores, both by key.
        scorer: name of the scorer's variant, which the scores depend on.
    """

    part: str
    items: Sequence[Item]
    new_tokens: int
    targets: Sequence[str]
    is_broken: Callable[[float], bool]
    clean_up: Callable[[str], str]
    score: Callable[[Mapping[str, str]], Mapping[str, float]]
    scorer: str = ""


class ArmStudy:
    """The passes of one arm.

    Args:
        config: the settings.
        task: the questions and their scorer.
        run: the vision encoder as the user named it.
        device: where the model runs.

    Raises:
        ConfigError: there is no such encoder.
    """

    def __init__(self, config: LlavaSettings, task: Task, run: str, device: torch.device) -> None:
        self._config, self._task, self._device = config, task, device
        self.run = read_tower_run(run)
        self.folder = ArmFolder(config.output, task.part, self.run.name, self.run.arm)
        self.half: Arithmetic = config.half or ("float16" if device.type == "cuda" else "float32")
        self.tower_sha256 = ""
        self._llava: tuple[Arithmetic, Llava] | None = None

    def claim(self, shared: Mapping[str, Any]) -> None:
        """Claim the arm's folder for these settings, which all arms share.

        Raises:
            ConfigError: an encoder that cannot be read, or a folder with results of other settings.
        """
        stored = self._config.model_dump(include={"save_images", "pictures"})
        own = {"encoder": self.run.encoder, **identify_tower(self.run, self._config.fit), **stored}
        self.folder.claim({**shared, "half": self.half}, own)

    def measure(self, progress: Progress) -> list[Case]:
        """Run every pass that is not stored yet.

        Raises:
            ConfigError: a model or encoder that cannot be used.
            DatamergeError: an image that cannot be read, or does not fit the device's memory.
        """
        cases = [self._resume(item) for item in self._task.items]
        for case in cases:
            progress.advance(len(case.plan) if case.next is None else len(case.record.passes), note=self.run.arm)
        for stage in STAGES:
            waiting = [case for case in cases if case.next is not None and case.next.stage == stage]
            size = self._config.batch_size
            for first in range(0, len(waiting), size):
                self._run_batch(waiting[first : first + size], stage, progress)
        self._llava = None
        self.tower_sha256 = cases[0].record.tower_sha256
        return cases

    def _resume(self, item: Item) -> Case:
        plan = plan_passes(len(item.references), self._task.targets, self._config.attack)
        stored = self.folder.read(item.key)
        if stored is None:
            record = CaseRecord(image=item.image.name, question=item.question, references=list(item.references))
            return Case(item, plan, record)
        try:
            return Case(item, plan, CaseRecord.model_validate(stored))
        except ValidationError as error:
            raise DatamergeError(
                f"{self.folder.path}/items/{item.key}.json: expected the passes of an image, found "
                f"{error.error_count()} problems; remove it to measure it again"
            ) from None

    def _run_batch(self, cases: Sequence[Case], stage: Stage, progress: Progress) -> None:
        """All passes of one stage of some images."""
        llava = self._load(stage)
        if any(case.record.tower_sha256 not in ("", llava.tower_sha256) for case in cases):
            raise ConfigError(
                f"output: expected results of the weights of {self.run.name!r}, found {self.folder.path}, which was "
                "begun with others; choose another `output`"
            )
        clean = torch.stack([torch.from_numpy(self._pixels(case.item, llava)) for case in cases])
        pixels = clean.to(self._device).float() / LEVELS
        while True:
            ready = [(case, case.next) for case in cases if case.next is not None and case.next.stage == stage]
            if not ready:
                return
            # Images have different numbers of references, and those of an interrupted batch are at different passes.
            _, step = min(ready, key=lambda entry: len(entry[0].record.passes))
            rows = [i for i, case in enumerate(cases) if case.next == step]
            self._run_pass(llava, step, [cases[i] for i in rows], pixels[rows])
            for case in (cases[i] for i in rows):
                left = len(case.plan) - len(case.record.passes)
                progress.advance(1 + left if case.record.dropped else 1, note=f"{self.run.arm}, {step.name}")

    def _run_pass(self, llava: Llava, step: Pass, cases: Sequence[Case], clean: Tensor) -> None:
        started = time.monotonic()
        with out_of_memory_advice(
            lambda: (
                f"pass {step.name} of {cases[0].item.image.name}: the model and its gradients do not "
                f"fit the memory of {self._device} with {len(cases)} images at once; lower `batch_size`, or use a "
                "larger GPU"
            )
        ):
            attempts = self._attack(llava, step, cases, clean)
            answers = self._answers(llava, cases, attempts)
        scores = self._task.score(answers) if answers else {}
        seconds = round((time.monotonic() - started) / len(cases), 3)
        for case, attempt, pixels in zip(cases, attempts, clean, strict=True):
            found = PassRecord(
                name=step.name,
                arithmetic=self._search(step) if step.attacks else self._arithmetic(step.stage),
                reference=_reference(step, case) if step.reference is not None else None,
                target=step.target,
                start_loss=attempt.start_loss,
                loss=attempt.loss,
                answer=answers.get(case.item.key),
                score=scores.get(case.item.key),
                failure=attempt.failure,
                seconds=seconds,
            )
            self._finish(llava, case, found, attempt, pixels)

    def _answers(self, llava: Llava, cases: Sequence[Case], attempts: Sequence[Attempt]) -> dict[str, str]:
        """The model's answers to the images of the attempts that did not fail, by key."""
        seen = [
            (case.item, attempt.pixels)
            for case, attempt in zip(cases, attempts, strict=True)
            if attempt.pixels is not None
        ]
        if not seen:
            return {}
        pixels = torch.stack([pixels for _, pixels in seen])
        texts = llava.generate(pixels, [item.question for item, _ in seen], self._task.new_tokens)
        return {item.key: self._task.clean_up(text) for (item, _), text in zip(seen, texts, strict=True)}

    def _attack(self, llava: Llava, step: Pass, cases: Sequence[Case], clean: Tensor) -> list[Attempt]:
        if not step.attacks:
            return [Attempt(pixels) for pixels in clean]
        if step.target is not None:
            answers = [step.target] * len(cases)
        else:
            answers = [str(case.item.references[_reference(step, case)]) for case in cases]
        initial = None
        if step.reference == "best":
            initial = torch.stack(
                [self._best_pixels(case, pixels) for case, pixels in zip(cases, clean, strict=True)]
            )
        return attack_answers(
            llava,
            clean,
            [case.item.question for case in cases],
            answers,
            self._config.attack_settings(),
            [case.item.image.name for case in cases],
            targeted=step.target is not None,
            initial=initial,
            precision=self._precision(step),
        )

    def _finish(self, llava: Llava, case: Case, found: PassRecord, attempt: Attempt, clean: Tensor) -> None:
        """Record a pass of one image; its best pixels are written before the record that refers to them."""
        record, score = case.record, found.score
        before = case.lowest[1] if record.passes else float("inf")
        record.passes.append(found)
        record.tower_sha256 = llava.tower_sha256
        if score is not None and score < before:
            if found.reference is not None and isinstance(case.plan[len(record.passes) - 1].reference, int):
                record.best_reference = found.reference
            if attempt.pixels is not None and found.name != CLEAN.name:
                buffer = io.BytesIO()
                np.save(buffer, attempt.pixels.cpu().numpy())
                self.folder.write_image(f"{case.item.key}.npy", buffer.getvalue())
        record.dropped = self._config.attack and score is not None and self._task.is_broken(score)
        if case.next is None:
            self._keep_image(llava, case, clean)
        self.folder.write(case.item.key, record.model_dump(mode="json"))
        if case.next is None:
            self.folder.image(f"{case.item.key}.npy").unlink(missing_ok=True)

    def _keep_image(self, llava: Llava, case: Case, clean: Tensor) -> None:
        """Store the strongest image on the 8-bit grid, and the model's answer to it."""
        shown = [item.key for item in self._task.items[: self._config.pictures]]
        if not self._config.attack or not (self._config.save_images or case.item.key in shown):
            return
        best = self._best_pixels(case, clean)
        rounded = round_inside(best, clean, self._config.epsilon)
        self.folder.write_image(f"{case.item.key}.png", to_png(rounded.cpu().numpy()))
        original = (clean * LEVELS).round().to(torch.uint8)
        self.folder.write_image(f"{case.item.key}-clean.png", to_png(original.cpu().numpy()))
        pixels = rounded.to(clean.device).float()[None] / LEVELS
        (text,) = llava.generate(pixels, [case.item.question], self._task.new_tokens)
        answer = self._task.clean_up(text)
        score = self._task.score({case.item.key: answer})[case.item.key]
        case.record.eight_bit = EightBit(answer=answer, score=score)

    def _best_pixels(self, case: Case, clean: Tensor) -> Tensor:
        """The image of the lowest score so far: an attack's, or the clean one."""
        file = self.folder.image(f"{case.item.key}.npy")
        if case.lowest[0].name == CLEAN.name or not file.is_file():
            return clean
        return torch.from_numpy(np.load(file)).to(clean.device)

    def _pixels(self, item: Item, llava: Llava) -> npt.NDArray[np.uint8]:
        return read_image(item.image, llava.preprocessing, self._config.fit)

    def _arithmetic(self, stage: Stage) -> Arithmetic:
        return self.half if stage == "half" else "float32"

    def _precision(self, step: Pass) -> Precision:
        """Precision of the search of a pass; float32 stands for the arithmetic of the weights."""
        return self._config.precision if self._arithmetic(step.stage) == "float32" else "float32"

    def _search(self, step: Pass) -> str:
        """Arithmetic of the search of a pass."""
        return "tf32" if self._precision(step) == "tf32" else self._arithmetic(step.stage)

    def _load(self, stage: Stage) -> Llava:
        arithmetic = self._arithmetic(stage)
        if self._llava is None or self._llava[0] != arithmetic:
            # The old model is released first: two would not fit.
            self._llava = None
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            config = self._config
            self._llava = (arithmetic, Llava(config.llava, self.run, config.image_size, self._device, arithmetic))
        return self._llava[1]


def _reference(step: Pass, case: Case) -> int:
    """Index of the answer that a pass attacks."""
    return step.reference if isinstance(step.reference, int) else case.record.best_reference
