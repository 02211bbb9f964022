"""Results of the evaluation of one encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from datamerge.evaluation.uncertainty import bootstrap_interval, mean_and_error, rate_and_error, wilson_interval
from storage_schemas.schema.run import RunSummary


class RejectedImage(BaseModel):
    """An image that could not be used.

    Attributes:
        sample: its name in the source.
        reason: why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: str
    reason: str


class Training(BaseModel):
    """The training of an encoder and its cost.

    Attributes:
        artifact: the artifact that it was trained on.
        steps: optimiser steps.
        seconds: wall time.
        bytes: bytes of the artifact's arrays that were read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    artifact: str
    steps: int
    seconds: float
    bytes: int

    @classmethod
    def of(cls, summary: RunSummary | None) -> Training | None:
        """The training that the summary of a run describes; None without a summary."""
        if summary is None:
            return None
        return cls(artifact=summary.artifact, steps=summary.steps, seconds=summary.seconds, bytes=summary.bytes)


class Score(BaseModel):
    """One cell of the table of arms: a mean over images.

    Attributes:
        name: name of the column, such as `COCO adv.`.
        value: the mean, in percent for rates.
        error: its standard error, None for one image.
        low, high: its 95 % interval.
        count: number of images.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: float
    error: float | None
    low: float
    high: float
    count: int


class ArmResult(BaseModel):
    """What one part of the evaluation measured for one arm.

    Attributes:
        part: pgd, zero-shot, embedding, captions or vqa.
        run: the run's folder or spec, as the user gave it.
        arm: row of the table.
        encoder: spec of the evaluated encoder.
        encoder_sha256: hash of its weights.
        scores: columns of the table.
        images: number of images or questions measured.
        rejected: images that could not be used.
        seconds: wall time spent on this arm over all calls, without decoding.
        training: the training of the run, None for a spec.
        note: definition of the scores, a line under the table.
        warnings: reasons to distrust the scores.
        settings: all settings of the measurement, defaults resolved.
        details: facts of this part only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: str
    run: str
    arm: str
    encoder: str
    encoder_sha256: str
    scores: list[Score]
    images: int
    rejected: list[RejectedImage] = []
    seconds: float
    training: Training | None = None
    note: str = ""
    warnings: list[str] = []
    settings: dict[str, Any]
    details: dict[str, Any]

    def score(self, name: str) -> Score:
        """The score of a column; raises KeyError where it was not measured."""
        for score in self.scores:
            if score.name == name:
                return score
        raise KeyError(f"{name}; measured: {', '.join(score.name for score in self.scores)}")

    def __repr_args__(self) -> Iterator[tuple[str, object]]:
        yield from (("part", self.part), ("arm", self.arm))
        yield "scores", {score.name: round(score.value, 4) for score in self.scores}


def rate_score(name: str, hits: Sequence[bool]) -> Score:
    """A rate in percent, with Wilson's interval. Needs at least one trial."""
    rate, error = rate_and_error(hits)
    low, high = wilson_interval(sum(hits), len(hits))
    return Score(
        name=name,
        value=100 * rate,
        error=100 * error,
        low=100 * low,
        high=100 * high,
        count=len(hits),
    )


def mean_score(name: str, values: Sequence[float]) -> Score:
    """A mean, with the bootstrap's interval. Needs at least one value."""
    mean, error = mean_and_error(values)
    low, high = bootstrap_interval(values)
    return Score(name=name, value=mean, error=error, low=low, high=high, count=len(values))
