"""Measures of one encoder on one batch: embedding losses and classifications, clean and under attack.

Shapes: B images, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks import (
    APGD,
    PGD,
    Precision,
    Survival,
    auto_attack,
    cross_entropy,
    run_attack,
    sample_generators,
    squared_error,
)
from datamerge.encoders import Encoder, Head
from datamerge.sources import Sample
from storage_schemas import DatamergeError

# Lists with one entry per image, by name.
Measured = dict[str, list[Any]]
# Attacks by their radius as the user wrote it, smallest first.
Attacks = Mapping[str, PGD | APGD]
# By position in the batch: the radius at which an image was first misclassified, and those pixels [C, H, W].
Broken = dict[int, tuple[str, Tensor]]

CLEAN_LOSS = "embedding loss clean"
TOP_1, TOP_5 = "top-1", "top-5"


@dataclass(frozen=True)
class Classifier:
    """A class head behind an encoder.

    Attributes:
        head: logits from embeddings, on the encoder's device.
        rows: row of the head for each label of the source.
    """

    head: Head
    rows: Mapping[int, int]


@dataclass(frozen=True)
class LabelledBatch:
    """The images of a batch that a classifier has classes for.

    Attributes:
        model: logits from pixels.
        pixels: float32 [B, C, H, W] in [0, 1].
        labels: rows of the head, int64 [B].
        samples: the B samples; their keys seed the attacks.
    """

    model: nn.Module
    pixels: Tensor
    labels: Tensor
    samples: Sequence[Sample]

    @classmethod
    def of(
        cls, encoder: Encoder, classifier: Classifier, pixels: Tensor, samples: Sequence[Sample]
    ) -> LabelledBatch | None:
        """The samples whose label the head has a row for; None if there are none."""
        rows = {
            index: classifier.rows[sample.label]
            for index, sample in enumerate(samples)
            if sample.label is not None and sample.label in classifier.rows
        }
        if not rows:
            return None
        model = nn.Sequential(encoder, classifier.head).eval()
        labels = torch.tensor(list(rows.values()), device=pixels.device)
        return cls(model, pixels[list(rows)], labels, [samples[index] for index in rows])

    @property
    def names(self) -> list[str]:
        """Names of the images in error messages."""
        return [sample.name for sample in self.samples]

    def take(self, rows: Tensor) -> LabelledBatch:
        """Some of the images, by position."""
        samples = [self.samples[row] for row in rows.tolist()]
        return LabelledBatch(self.model, self.pixels[rows], self.labels[rows], samples)


def embedding_losses(
    encoder: Encoder,
    original: Encoder,
    pixels: Tensor,
    samples: Sequence[Sample],
    *,
    attacks: Attacks,
    seed: int,
    restarts: int = 1,
    precision: Precision = "float32",
) -> Measured:
    """‖f(x) − f_original(x)‖² and, for every attack, ‖f(x') − f_original(x)‖² with the x' that it finds.

    x and all smaller balls lie inside a ball, so the losses of an image never fall from one radius to the next.

    Args:
        encoder: f.
        original: the frozen reference.
        pixels: x, float32 [B, C, H, W] in [0, 1].
        samples: the B samples; their keys seed the attacks.
        attacks: attacks that maximise the squared distance.
        seed: seed of the evaluation.
        restarts: random starts of each attack.
        precision: arithmetic of the search; losses are computed in float32.

    Raises:
        DatamergeError: a loss is not finite; names the samples.
    """
    names = [sample.name for sample in samples]
    with torch.no_grad():
        target = original(pixels)
        worst = squared_error(encoder(pixels), target)
    check_finite(worst, names, "the clean embedding loss")
    columns: Measured = {CLEAN_LOSS: worst.tolist()}
    for text, settings in attacks.items():
        generators = _generators(samples, seed)
        found = run_attack(
            encoder,
            pixels,
            target,
            squared_error,
            settings,
            generators,
            names,
            restarts=restarts,
            precision=precision,
        )
        loss = found.loss
        if precision != "float32":
            with torch.no_grad():
                loss = squared_error(encoder(found.pixels), target)
        check_finite(loss, names, "the embedding loss under attack")
        worst = torch.maximum(worst, loss)
        columns[text] = worst.tolist()
    return columns


def classifications(
    batch: LabelledBatch,
    *,
    attacks: Attacks,
    seed: int,
    restarts: int = 1,
    targeted: bool = True,
    precision: Precision = "float32",
    broken: Broken | None = None,
) -> Measured:
    """Whether images are classified correctly: clean, among the best five, and under every attack.

    The first attack gets the images that are classified correctly clean, each later one those that are robust to the
    attack before it, since every ball contains the smaller ones. PGD is judged by the image it ends at, APGD by every
    point it visits.

    Args:
        batch: the images.
        attacks: attacks that maximise the cross entropy.
        seed: seed of the evaluation.
        restarts: random starts of each attack.
        targeted: whether targeted attacks follow APGD on the cross entropy.
        precision: arithmetic of the search; images are classified in float32.
        broken: if given, receives the misclassified images that the attacks find.

    Returns:
        Columns `top-1`, `top-5` and one per radius; for APGD also `RADIUS APGD-CE`, the column before the targeted
        attacks.

    Raises:
        DatamergeError: a logit or a gradient is not finite; names the samples.
    """
    logits = _logits(batch.model, batch.pixels, batch.names)
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    robust = torch.eq(best[:, 0], batch.labels)
    columns: Measured = {
        TOP_1: robust.tolist(),
        TOP_5: (best == batch.labels[:, None]).any(dim=1).tolist(),
    }
    for text, settings in attacks.items():
        rows = torch.nonzero(robust).flatten()
        robust, after = torch.zeros_like(robust), torch.zeros_like(robust)
        if len(rows):
            left = batch.take(rows)
            generators = _generators(left.samples, seed)
            if isinstance(settings, APGD):
                found = _survive_apgd(left, settings, generators, restarts, targeted, precision)
                robust[rows], after[rows], pixels = found.robust, found.after_cross_entropy, found.pixels
            else:
                robust[rows], pixels = _survive_pgd(left, settings, generators, restarts, precision)
            if broken is not None:
                places = enumerate(rows.tolist())
                broken |= {row: (text, pixels[place]) for place, row in places if not robust[row]}
        columns[text] = robust.tolist()
        if isinstance(settings, APGD):
            columns[f"{text} APGD-CE"] = after.tolist()
    return columns


def _survive_pgd(
    batch: LabelledBatch,
    settings: PGD,
    generators: Sequence[np.random.Generator],
    restarts: int,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """Which images are classified correctly where the attack ends, bool [B], and the pixels there."""
    found = run_attack(
        batch.model,
        batch.pixels,
        batch.labels,
        cross_entropy,
        settings,
        generators,
        batch.names,
        restarts=restarts,
        precision=precision,
    )
    right = torch.eq(_logits(batch.model, found.pixels, batch.names).argmax(dim=1), batch.labels)
    return right, found.pixels


def _survive_apgd(
    batch: LabelledBatch,
    settings: APGD,
    generators: Sequence[np.random.Generator],
    restarts: int,
    targeted: bool,
    precision: Precision,
) -> Survival:
    return auto_attack(
        batch.model,
        batch.pixels,
        batch.labels,
        settings,
        generators,
        batch.names,
        targeted=targeted,
        restarts=restarts,
        precision=precision,
    )


def check_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    """Raise DatamergeError that names the samples with a value that is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = [names[index] for index in torch.nonzero(~finite).flatten().tolist()]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DatamergeError(f"{what} is not finite for {', '.join(bad[:5])}{more}; check the encoder's weights")


def _generators(samples: Sequence[Sample], seed: int) -> list[np.random.Generator]:
    return [sample_generators(seed, sample.key, 1)[0] for sample in samples]


def _logits(model: nn.Module, pixels: Tensor, names: Sequence[str]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(pixels)
    check_finite(logits.sum(dim=1), names, "the sum of logits")
    return logits
