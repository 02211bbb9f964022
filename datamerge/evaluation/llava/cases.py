"""The question about an image, and the result of every finished pass: the contents of its JSON file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from datamerge.evaluation.llava.attack import Pass


@dataclass(frozen=True)
class Item:
    """A question about an image.

    Attributes:
        key: name of its JSON file.
        image: its file.
        question: the question to the model.
        references: right answers; the passes attack them in this order.
        answers: further answers that the score depends on.
    """

    key: str
    image: Path
    question: str
    references: Sequence[str]
    answers: Sequence[str] = ()


class PassRecord(BaseModel):
    """Result of one pass.

    Attributes:
        name: name of the pass.
        arithmetic: float16, bfloat16 or float32; tf32 if the search alone used it.
        reference: index of the attacked reference, None for other passes.
        target: answer whose likelihood was raised, None for other passes.
        start_loss, loss: of the attacked answer, None without an attack.
        answer, score: the model's answer after the attack and its score, None if the attack failed.
        failure: why the attack failed.
        seconds: wall time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    arithmetic: str
    reference: int | None
    target: str | None
    start_loss: float | None
    loss: float | None
    answer: str | None
    score: float | None
    failure: str | None
    seconds: float


class EightBit(BaseModel):
    """The model's answer to the strongest image on the 8-bit grid, and its score."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answer: str
    score: float


class CaseRecord(BaseModel):
    """The JSON file of an item.

    Attributes:
        image, question, references: file name of the image, the question and its right answers.
        passes: the finished passes.
        best_reference: index of the reference whose attack found the strongest image so far.
        dropped: whether the score is so low that the image is not attacked any further.
        tower_sha256: hash of the vision tower's weights; empty before the first pass.
        eight_bit: answer to the stored image, None if none is stored.
    """

    model_config = ConfigDict(extra="forbid")

    image: str
    question: str
    references: list[str]
    passes: list[PassRecord] = []
    best_reference: int = 0
    dropped: bool = False
    tower_sha256: str = ""
    eight_bit: EightBit | None = None


@dataclass(frozen=True)
class Case:
    """An item, its planned passes, and their results so far."""

    item: Item
    plan: Sequence[Pass]
    record: CaseRecord

    @property
    def next(self) -> Pass | None:
        """The pass to run next, None when there is none."""
        done = len(self.record.passes)
        return None if self.record.dropped or done == len(self.plan) else self.plan[done]

    @property
    def lowest(self) -> tuple[PassRecord, float]:
        """The pass with the lowest score, the first of several, and that score."""
        scored = [(found, found.score) for found in self.record.passes if found.score is not None]
        return min(scored, key=lambda entry: entry[1])

    @property
    def clean_score(self) -> float:
        """Score of the answer to the clean image."""
        score = self.record.passes[0].score
        if score is None:
            raise ValueError(f"{self.item.key}: the clean pass has no score")
        return score
