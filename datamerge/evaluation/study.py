"""Measures encoders on raw images batch by batch; every finished batch of every encoder is stored.

Images are decoded once and shown to every encoder in turn, so all rows of a table are about the same images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamerge.evaluation.batches import Batch, read_batches, report_rejected
from datamerge.evaluation.config import StudyConfig
from datamerge.evaluation.encoders_under_test import Subject
from datamerge.evaluation.results import RejectedImage
from datamerge.evaluation.store import ArmFolder
from datamerge.runtime import Progress
from datamerge.runtime.memory import is_out_of_memory
from datamerge.sources import Sample, Source, open_source
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.moments import LEVELS

# What was measured of a batch: lists with one entry per usable sample, by name.
Measured = dict[str, list[Any]]
Measure = Callable[[Subject, Tensor, Sequence[Sample]], Measured]

# Settings that determine the numbers.
SHARED = {"limit", "sample", "sample_seed", "seed", "epsilons", "norm", "steps", "restarts"}


@dataclass(frozen=True)
class Study:
    """Everything measured for one subject.

    Attributes:
        columns: per sample, in the source's order.
        images: usable ones.
        rejected: the others.
        seconds: wall time of all sittings, decoding left out.
    """

    columns: Measured
    images: int
    rejected: Sequence[RejectedImage]
    seconds: float


def open_sample(config: StudyConfig) -> Source:
    """The source, or a random part of it: `numpy.random` seeded, `choice` without replacement, as in FARE.

    Raises:
        SourceError: nothing there.
        ConfigError: fewer samples than asked for.
    """
    source = open_source(
        config.data, limit=config.limit, image_column=config.image_column, label_column=config.label_column
    )
    if config.sample is None:
        return source
    if config.sample > len(source.samples):
        raise ConfigError(
            f"sample: expected at most the {len(source.samples)} samples of {source.url}, found {config.sample}"
        )
    chosen = np.random.RandomState(config.sample_seed).choice(len(source.samples), config.sample, replace=False)
    return replace(source, samples=[source.samples[index] for index in chosen.tolist()])


def run_study(
    config: StudyConfig,
    part: str,
    subjects: Sequence[Subject],
    own: Sequence[Mapping[str, Any]],
    source: Source,
    measure: Measure,
    **shared: Any,
) -> list[Study]:
    """Measure what is not yet stored; one result per subject.

    Args:
        config: the settings.
        part: name of the evaluation.
        subjects: what to measure.
        own: what determines each subject's numbers besides its weights.
        source: the images.
        measure: one batch of one subject.
        shared: settings of this part only that determine all subjects' numbers.

    Raises:
        ConfigError: the output folder holds results of other settings.
        SourceError: no image can be used.
        DatamergeError: a batch that does not fit the device, or numbers that are not finite.
    """
    folders = [ArmFolder(config.output, part, subject.run.name, subject.run.arm) for subject in subjects]
    shared |= {"data_fingerprint": source.fingerprint, **config.model_dump(mode="json", include=SHARED)}
    for folder, subject, more in zip(folders, subjects, own, strict=True):
        weights = {"encoder": subject.encoder.spec, "encoder_sha256": subject.encoder.sha256}
        folder.claim(shared, {**weights, "batch_size": config.batch_size, **more})
    batches = -(-len(source.samples) // config.batch_size)
    stored = [[folder.read(f"{index:06d}") for index in range(batches)] for folder in folders]
    first = next((i for i in range(batches) if any(column[i] is None for column in stored)), batches)
    remaining = replace(source, samples=source.samples[first * config.batch_size :])
    shape = subjects[0].encoder.input_shape
    total = len(source.samples) * len(subjects)
    done = len(subjects) * min(first * config.batch_size, len(source.samples))
    device = subjects[0].encoder.mean.device
    with Progress(part, total, "images", done=done) as progress:
        for index, batch in enumerate(read_batches(remaining, shape, config.batch_size), start=first):
            pixels = torch.from_numpy(batch.pixels).to(device).float() / LEVELS
            for subject, folder, column in zip(subjects, folders, stored, strict=True):
                if column[index] is None:
                    column[index] = _measure_batch(config, subject, batch, pixels, measure)
                    folder.write(f"{index:06d}", column[index] or {})
                progress.advance(batch.listed, note=subject.run.arm)
    studies = [_collect([item for item in column if item is not None]) for column in stored]
    report_rejected(studies[0].rejected, source)
    return studies


def _measure_batch(
    config: StudyConfig, subject: Subject, batch: Batch, pixels: Tensor, measure: Measure
) -> dict[str, Any]:
    started = time.monotonic()
    columns: Measured = {}
    try:
        if batch.samples:
            columns = measure(subject, pixels, batch.samples)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DatamergeError(
            f"batch_size: {config.batch_size} images with gradients do not fit the memory of {pixels.device}; try "
            f"--batch-size {max(1, config.batch_size // 4)} and another --output"
        ) from None
    return {
        "samples": [sample.name for sample in batch.samples],
        "columns": columns,
        "rejected": [image.model_dump() for image in batch.rejected],
        "seconds": round(time.monotonic() - started, 3),
    }


def _collect(items: Sequence[Mapping[str, Any]]) -> Study:
    columns: Measured = {}
    for item in items:
        for name, values in item["columns"].items():
            columns.setdefault(name, []).extend(values)
    return Study(
        columns,
        sum(len(item["samples"]) for item in items),
        [RejectedImage.model_validate(image) for item in items for image in item["rejected"]],
        round(sum(item["seconds"] for item in items), 3),
    )
