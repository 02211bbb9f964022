"""What evaluations say of one encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from datamerge.evaluation.uncertainty import bootstrap_interval, mean_and_error, rate_and_error, wilson_interval


class RejectedImage(BaseModel):
    """An image that could not be used.

    Attributes:
        sample: its name in the source.
        reason: why.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sample: str
    reason: str


class Evaluation(BaseModel):
    """One row of a table of arms; the same images for every row of one call.

    Attributes:
        run: the run's folder or the spec, as it was given.
        arm: the run's arm, `w/o AT` for a spec.
        encoder: spec of the evaluated encoder.
        encoder_sha256: hash of its weights.
        original: spec of the frozen encoder that embedding losses are measured against.
        original_sha256: hash of its weights.
        data: URL of the source.
        data_fingerprint: hash of the source's listing, limit not applied.
        images: images measured.
        rejected: images that could not be used.
        embedding_loss_clean: mean over images of ‖f(x) − f_original(x)‖², summed over dimensions.
        embedding_loss_adversarial: the same of f(x') with x' from the attack that maximises it.
        embedding_loss_clean_se, embedding_loss_adversarial_se: standard errors of these means, None for one image.
        head: the class head, None if there was none.
        labelled: images with a label that a head classified; accuracies are None when there are none.
        accuracy_clean: fraction of labelled images classified correctly.
        accuracy_robust: fraction classified correctly both clean and under the attack on cross entropy.
        accuracy_clean_se, accuracy_robust_se: binomial standard errors √(p(1 − p)/n), as fractions.
        epsilon: radius of the ℓ∞ ball, an exact fraction of the pixel range.
        step_size: of the attack, the same way.
        steps: of the attack.
        on_grid: whether attacked pixels were multiples of 1/255.
        seed: of the random starts.
        seconds: wall time spent on this encoder, decoding left out.
        artifact: what the run was trained on, None for a spec.
        train_steps: optimiser steps of the run, None for a spec.
        train_seconds: wall time of the training, None for a spec.
        artifact_bytes: stored bytes the training read, None for a spec.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    arm: str
    encoder: str
    encoder_sha256: str
    original: str
    original_sha256: str
    data: str
    data_fingerprint: str
    images: int
    rejected: list[RejectedImage]
    embedding_loss_clean: float
    embedding_loss_clean_se: float | None
    embedding_loss_adversarial: float
    embedding_loss_adversarial_se: float | None
    head: str | None
    labelled: int
    accuracy_clean: float | None
    accuracy_clean_se: float | None
    accuracy_robust: float | None
    accuracy_robust_se: float | None
    epsilon: str
    step_size: str
    steps: int
    on_grid: bool
    seed: int
    seconds: float
    artifact: str | None
    train_steps: int | None
    train_seconds: float | None
    artifact_bytes: int | None


class Score(BaseModel):
    """One cell of the table of arms: a mean over images.

    Attributes:
        name: of the column, such as `COCO adv.`.
        value: the mean, in percent for rates.
        error: its standard error, None for one image.
        low, high: its 95 % interval.
        count: images.
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
        part: zero-shot, embedding, captions or vqa.
        run: the run's folder or spec, as it was given.
        arm: row of the table.
        encoder: spec of the evaluated encoder.
        encoder_sha256: hash of its weights.
        scores: columns of the table.
        images: images or questions measured.
        seconds: wall time spent on this arm in all sittings, decoding left out.
        warnings: what the reader must know before trusting the scores.
        settings: all settings of the measurement, defaults resolved.
        details: what belongs to this part only.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    part: str
    run: str
    arm: str
    encoder: str
    encoder_sha256: str
    scores: list[Score]
    images: int
    seconds: float
    warnings: list[str]
    settings: dict[str, Any]
    details: dict[str, Any]


def rate_score(name: str, hits: Sequence[bool]) -> Score:
    """A rate in percent, with Wilson's interval. Needs at least one trial."""
    rate, error = rate_and_error(hits)
    low, high = wilson_interval(sum(hits), len(hits))
    return Score(
        name=name,
        value=100 * (rate or 0.0),
        error=None if error is None else 100 * error,
        low=100 * low,
        high=100 * high,
        count=len(hits),
    )


def mean_score(name: str, values: Sequence[float]) -> Score:
    """A mean, with the bootstrap's interval. Needs at least one value."""
    mean, error = mean_and_error(values)
    low, high = bootstrap_interval(values)
    return Score(name=name, value=mean, error=error, low=low, high=high, count=len(values))
