"""Measures encoders on raw images batch by batch; every finished batch of every encoder is stored.

Images are read once and shown to every encoder in turn, each time as that encoder takes them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamerge.evaluation.batches import ImageBatch, read_batches, report_rejected
from datamerge.evaluation.config import ImagesConfig
from datamerge.evaluation.encoders_under_test import Subject
from datamerge.evaluation.measures import Measured
from datamerge.evaluation.results import ArmResult, RejectedImage, Score, Training
from datamerge.evaluation.sampling import draw
from datamerge.evaluation.store import PREPROCESSING, ArmFolder
from datamerge.runtime import Progress
from datamerge.runtime.memory import out_of_memory_advice
from datamerge.runtime.messages import say
from datamerge.sources import Sample, Source, open_source
from datamerge.sources.images import describe_remarks
from datamerge.sources.orientation import Exif, exif_of
from storage_schemas import ConfigError
from storage_schemas.schema.moments import LEVELS

# Settings that determine the numbers, of those that a part has.
DECISIVE = {"sample", "sample_seed", "seed", "steps", "restarts"}
DECISIVE |= {"epsilons", "norm", "epsilon", "step_size", "grid"}


@dataclass(frozen=True)
class StudyRow:
    """One encoder in a study.

    Attributes:
        subject: the encoder.
        identity: what determines its numbers besides its weights and the shared settings.
        measure: from pixels float32 [B, C, H, W] in [0, 1] and their samples to the columns of a batch.
    """

    subject: Subject
    identity: Mapping[str, Any]
    measure: Callable[[Tensor, Sequence[Sample]], Measured]


@dataclass(frozen=True)
class Measurements:
    """Everything measured for one encoder.

    Attributes:
        subject: the encoder.
        columns: per sample, in the source's order.
        images: number of usable images.
        rejected: the images that could not be used.
        exif: whether images were turned as their EXIF data say.
        seconds: wall time over all calls, without decoding.
    """

    subject: Subject
    columns: Measured
    images: int
    rejected: list[RejectedImage]
    exif: Exif
    seconds: float

    def result(self, part: str, config: ImagesConfig, scores: list[Score], **more: Any) -> ArmResult:
        """The result of these measurements; `more` are other fields of `ArmResult`."""
        run, encoder = self.subject.run, self.subject.encoder
        fields = {
            "part": part,
            "run": run.name,
            "arm": run.arm,
            "encoder": encoder.spec,
            "encoder_sha256": encoder.sha256,
            "scores": scores,
            "images": self.images,
            "rejected": self.rejected,
            "seconds": self.seconds,
            "training": Training.of(run.summary),
            "settings": {**config.model_dump(mode="json"), "exif": self.exif},
        }
        return ArmResult(**{**fields, **more})


def open_sample(config: ImagesConfig) -> Source:
    """The source, or the random part of it that the settings ask for.

    Raises:
        SourceError: there is no image.
        ConfigError: the source has fewer samples than `sample`.
    """
    source = open_source(
        config.data,
        limit=config.limit,
        limit_first=config.limit_first,
        seed=config.seed,
        image_column=config.image_column,
        label_column=config.label_column,
        split=config.split,
    )
    if config.sample is None:
        return source
    if config.sample > len(source.samples):
        raise ConfigError(
            f"sample: expected at most the {len(source.samples)} samples of {source.url}, found {config.sample}"
        )
    chosen = draw(range(len(source.samples)), config.sample, config.sample_seed)
    return replace(source, samples=source.samples.take(np.array(chosen)), blocks=None)


def run_study(
    config: ImagesConfig, part: str, rows: Sequence[StudyRow], source: Source, **shared: Any
) -> list[Measurements]:
    """Measure every batch that is not stored yet; one result per row.

    Args:
        config: the settings.
        part: name of the evaluation.
        rows: the encoders.
        source: the images.
        shared: further settings that determine the numbers of all rows.

    Raises:
        ConfigError: the output folder holds results of other settings.
        SourceError: no image can be used.
        DatamergeError: a batch that does not fit the device, or numbers that are not finite.
    """
    exif = exif_of(config.exif, source.kind)
    # Results of earlier releases, which ignored EXIF, have no entry for it.
    shared |= {"exif": None if exif == "ignore" else exif}
    shared |= {"precision": None if config.precision == "float32" else config.precision}
    shared |= {"data_fingerprint": source.fingerprint, **config.model_dump(mode="json", include=DECISIVE)}
    # Results of earlier releases call it `limit`; nothing was drawn then.
    shared |= {"limit": config.limit_first, "limit_drawn": config.limit}
    folders = [_claim(config, part, row, shared) for row in rows]
    batches = -(-len(source.samples) // config.batch_size)
    stored = [[folder.read(f"{index:06d}") if folder else None for index in range(batches)] for folder in folders]
    first = next((i for i in range(batches) if any(column[i] is None for column in stored)), batches)
    remaining = source.take(np.arange(first * config.batch_size, len(source.samples)))
    # Encoders that differ in the normalisation alone share their pixels.
    shown = [row.subject.encoder.preprocessing.geometry for row in rows]
    distinct = list(dict.fromkeys(shown))
    device = rows[0].subject.encoder.mean.device
    total = len(source.samples) * len(rows)
    done = len(rows) * min(first * config.batch_size, len(source.samples))
    remarks: Counter[str] = Counter()
    with Progress(part, total, "images", done=done) as progress:
        for index, read in enumerate(read_batches(remaining, distinct, config.batch_size, exif), start=first):
            remarks.update(read[0].remarks)
            pixels = [torch.from_numpy(batch.pixels).to(device).float() / LEVELS for batch in read]
            for row, folder, column, geometry in zip(rows, folders, stored, shown, strict=True):
                place = distinct.index(geometry)
                if column[index] is None:
                    column[index] = found = _measure_batch(config, row, read[place], pixels[place])
                    if folder is not None:
                        folder.write(f"{index:06d}", found)
                progress.advance(read[place].listed, note=row.subject.run.arm)
    for line in describe_remarks(remarks, len(remaining.samples), exif):
        say(f"{source.url}: {line}")
    studied = [
        _collect(row.subject, exif, [item for item in column if item is not None])
        for row, column in zip(rows, stored, strict=True)
    ]
    # One warning for all rows, unless an image is usable for some encoders only.
    for number, one in enumerate(studied):
        if all(one.rejected != other.rejected for other in studied[:number]):
            report_rejected(one.rejected, source)
    return studied


def _claim(config: ImagesConfig, part: str, row: StudyRow, shared: Mapping[str, Any]) -> ArmFolder | None:
    """The row's folder in the output folder; None where nothing is stored."""
    if config.output is None:
        return None
    encoder = row.subject.encoder
    folder = ArmFolder(config.output, part, row.subject.run.name, row.subject.run.arm)
    own = {
        "encoder": encoder.spec,
        **{f"encoder_{name}": value for name, value in encoder.identity.items()},
        "batch_size": config.batch_size,
        PREPROCESSING: encoder.preprocessing.record(),
    }
    folder.claim(shared, {**own, **row.identity})
    return folder


def _measure_batch(config: ImagesConfig, row: StudyRow, batch: ImageBatch, pixels: Tensor) -> dict[str, Any]:
    started = time.monotonic()
    columns: Measured = {}

    def advice() -> str:
        another = "" if config.output is None else " and another `output`"
        return (
            f"{config.batch_size} images with gradients do not fit the memory of {pixels.device}; try "
            f"`batch_size={max(1, config.batch_size // 4)}`{another}"
        )

    with out_of_memory_advice(advice):
        if batch.samples:
            columns = row.measure(pixels, batch.samples)
    return {
        "samples": [sample.name for sample in batch.samples],
        "columns": columns,
        "rejected": [image.model_dump() for image in batch.rejected],
        "seconds": round(time.monotonic() - started, 3),
    }


def _collect(subject: Subject, exif: Exif, items: Sequence[Mapping[str, Any]]) -> Measurements:
    columns: Measured = {}
    for item in items:
        for name, values in item["columns"].items():
            columns.setdefault(name, []).extend(values)
    return Measurements(
        subject,
        columns,
        sum(len(item["samples"]) for item in items),
        [RejectedImage.model_validate(image) for item in items for image in item["rejected"]],
        exif,
        round(sum(item["seconds"] for item in items), 3),
    )
