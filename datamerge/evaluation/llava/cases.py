"""What is asked about an image, and what every finished pass found: the contents of its JSON file."""

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
        question: put to the model.
        references: right answers, those to attack first.
        answers: what else the score depends on.
    """

    key: str
    image: Path
    question: str
    references: Sequence[str]
    answers: Sequence[str] = ()


class PassRecord(BaseModel):
    """What one pass found.

    Attributes:
        name: of the pass.
        arithmetic: float16, bfloat16 or float32; tf32 where the search, and nothing else, was in it.
        reference: index of the attacked reference, None for other passes.
        target: answer whose likelihood was raised, None for other passes.
        start_loss, loss: of the attacked answer, None without an attack.
        answer, score: what the model said then, None where the attack failed.
        failure: why it failed.
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
    """What the model says to the strongest image on the 8-bit grid."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    answer: str
    score: float


class CaseRecord(BaseModel):
    """The JSON file of an item.

    Attributes:
        image, question, references: what was asked.
        passes: finished ones.
        best_reference: index of the reference that the strongest image so far was found with.
        dropped: whether its score is so low that it is left alone.
        tower_sha256: hash of the vision tower's weights; empty before the first pass.
        eight_bit: of the stored image, None where none is stored.
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
    """An item, the passes it is to go through, and what was found so far."""

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
        """Score of the answer to the image as it is."""
        score = self.record.passes[0].score
        if score is None:
            raise ValueError(f"{self.item.key}: the clean pass has no score")
        return score
