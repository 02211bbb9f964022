"""From settings to results: load everything, refuse what does not go together, then measure batch by batch.

Images are decoded once and shown to every encoder in turn, so all rows of a table are about the same images.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from datamerge.attacks import PGD
from datamerge.encoders import pick_device
from datamerge.evaluation.batches import Batch, read_batches, report_rejected
from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.encoders_under_test import Subject, add_heads, load_subjects, numerics
from datamerge.evaluation.labels import make_heads
from datamerge.evaluation.metrics import Tally, correct, embedding_losses
from datamerge.evaluation.results import Evaluation, RejectedImage
from datamerge.evaluation.runs import read_run
from datamerge.evaluation.uncertainty import mean_and_error, rate_and_error
from datamerge.runtime import Progress
from datamerge.runtime.memory import is_out_of_memory
from datamerge.sources import Source, open_source
from storage_schemas import DatamergeError
from storage_schemas.schema.moments import LEVELS


def evaluate(config: EvaluateConfig) -> list[Evaluation]:
    """Measure encoders on raw images, clean and under attack; one result per run, in the order given.

    Raises:
        ConfigError: runs, head, labels or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a loss that is not finite, or a batch that does not fit the device.
    """
    settings = config.attack_settings()
    device = pick_device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_source(
        config.data, limit=config.limit, image_column=config.image_column, label_column=config.label_column
    )
    subjects = load_subjects(runs, device, config.original)
    heads = make_heads(config.head, config.class_names, [subject.encoder for subject in subjects])
    add_heads(subjects, heads, source, str(config.head))
    tallies = [Tally() for _ in subjects]
    with numerics(config.threads, device):
        rejected = _measure(config, subjects, tallies, source, settings, device)
    return [
        _result(config, settings, subject, tally, source, rejected)
        for subject, tally in zip(subjects, tallies, strict=True)
    ]


def _measure(
    config: EvaluateConfig,
    subjects: Sequence[Subject],
    tallies: Sequence[Tally],
    source: Source,
    settings: PGD,
    device: torch.device,
) -> list[RejectedImage]:
    """Fill every subject's tally; returns the images that could not be used."""
    rejected: list[RejectedImage] = []
    shape = subjects[0].encoder.input_shape
    with Progress("evaluate", len(source.samples) * len(subjects), "images") as progress:
        for batch in read_batches(source, shape, config.batch_size):
            rejected += batch.rejected
            pixels = torch.from_numpy(batch.pixels).to(device).float() / LEVELS
            for subject, tally in zip(subjects, tallies, strict=True):
                if batch.samples:
                    _measure_batch(config, subject, tally, batch, pixels, settings)
                progress.advance(batch.listed, note=subject.run.arm)
    report_rejected(rejected, source)
    return rejected


def _measure_batch(
    config: EvaluateConfig, subject: Subject, tally: Tally, batch: Batch, pixels: Tensor, settings: PGD
) -> None:
    started = time.monotonic()
    samples = batch.samples
    try:
        with torch.no_grad():
            target = subject.original(pixels)
        clean, adversarial = embedding_losses(subject.encoder, target, pixels, samples, settings, config.seed)
        tally.clean_loss += clean.tolist()
        tally.adversarial_loss += adversarial.tolist()
        # Empty without a head; an unlabelled sample has no row either.
        rows = {
            index: subject.rows[sample.label]
            for index, sample in enumerate(samples)
            if sample.label is not None and sample.label in subject.rows
        }
        if subject.head is not None and rows:
            chosen = list(rows)
            labels = torch.tensor(list(rows.values()), device=pixels.device)
            hits, robust = correct(
                subject.encoder,
                subject.head,
                labels,
                pixels[chosen],
                [samples[index] for index in chosen],
                settings,
                config.seed,
            )
            tally.clean_correct += hits.tolist()
            tally.robust_correct += robust.tolist()
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DatamergeError(
            f"batch_size: {config.batch_size} images with gradients do not fit the memory of {pixels.device}; try "
            f"--batch-size {max(1, config.batch_size // 4)}"
        ) from None
    tally.seconds += time.monotonic() - started


def _result(
    config: EvaluateConfig,
    settings: PGD,
    subject: Subject,
    tally: Tally,
    source: Source,
    rejected: Sequence[RejectedImage],
) -> Evaluation:
    run = subject.run
    clean, clean_error = mean_and_error(tally.clean_loss)
    adversarial, adversarial_error = mean_and_error(tally.adversarial_loss)
    accuracy, accuracy_error = rate_and_error(tally.clean_correct)
    robust, robust_error = rate_and_error(tally.robust_correct)
    return Evaluation(
        run=run.name,
        arm=run.arm,
        encoder=subject.encoder.spec,
        encoder_sha256=subject.encoder.sha256,
        original=subject.original.spec,
        original_sha256=subject.original.sha256,
        data=source.url,
        data_fingerprint=source.fingerprint,
        images=len(tally.clean_loss),
        rejected=list(rejected),
        embedding_loss_clean=clean,
        embedding_loss_clean_se=clean_error,
        embedding_loss_adversarial=adversarial,
        embedding_loss_adversarial_se=adversarial_error,
        head=config.head,
        labelled=len(tally.clean_correct),
        accuracy_clean=accuracy,
        accuracy_clean_se=accuracy_error,
        accuracy_robust=robust,
        accuracy_robust_se=robust_error,
        epsilon=str(config.epsilon),
        step_size=str(settings.step_size),
        steps=settings.steps,
        on_grid=settings.on_grid,
        seed=config.seed,
        seconds=round(tally.seconds, 3),
        artifact=run.artifact,
        train_steps=run.steps,
        train_seconds=run.seconds,
        artifact_bytes=run.bytes,
    )
