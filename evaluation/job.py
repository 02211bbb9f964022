"""From settings to results: load everything, refuse what does not go together, then measure batch by batch.

Images are decoded once and shown to every encoder in turn, so all rows of a table are about the same images.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
import torch
from torch import Tensor

from adversarial import PGD, Encoder, Head, load_encoder
from console import Progress
from evaluation.batches import Batch, read_batches
from evaluation.config import EvaluateConfig
from evaluation.labels import OUTPUTS, make_heads, match_labels
from evaluation.metrics import Tally, correct, embedding_losses, mean_and_error, rate_and_error
from evaluation.results import Evaluation, RejectedImage
from evaluation.runs import Run, read_run, warn
from sources import Source, open_source
from storage_schemas import ConfigError, DatamergeError, SourceError


@dataclass
class Subject:
    """One encoder under evaluation.

    Attributes:
        run: where it comes from.
        encoder: f, on the device.
        original: the frozen reference, on the device; `encoder` itself for a baseline.
        head: behind the encoder, None without accuracies.
        rows: row of the head for each label of the source.
        tally: what was measured so far.
    """

    run: Run
    encoder: Encoder
    original: Encoder
    head: Head | None = None
    rows: Mapping[int, int] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)


def evaluate(config: EvaluateConfig) -> list[Evaluation]:
    """Measure encoders on raw images, clean and under attack; one result per run, in the order given.

    Raises:
        ConfigError: runs, head, labels or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a loss that is not finite, or a batch that does not fit the device.
    """
    settings = config.attack_settings()
    device = _device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_source(
        config.data, limit=config.limit, image_column=config.image_column, label_column=config.label_column
    )
    subjects = _load(config, runs, device)
    _add_heads(config, subjects, source, device)
    with _threads(config.threads):
        rejected = _measure(config, subjects, source, settings, device)
    return [_result(config, settings, subject, source, rejected) for subject in subjects]


def _load(config: EvaluateConfig, runs: Sequence[Run], device: torch.device) -> list[Subject]:
    """Load each network once, however many runs refer to it."""
    loaded: dict[str, Encoder] = {}

    def load(spec: str) -> Encoder:
        if spec not in loaded:
            loaded[spec] = load_encoder(spec, str(device))
            if loaded[spec].random_weights:
                warn(f"encoder {spec} has random weights; nobody has trained it")
        return loaded[spec]

    subjects = [Subject(run, load(run.encoder), load(config.original or run.original)) for run in runs]
    shape = subjects[0].encoder.input_shape
    for subject in subjects:
        for encoder in (subject.encoder, subject.original):
            if encoder.input_shape != shape:
                raise ConfigError(
                    f"RUN {subject.run.name!r}: expected encoders for pixels {tuple(shape)} as in "
                    f"{subjects[0].run.name!r}, found {tuple(encoder.input_shape)}; evaluate them "
                    "separately"
                )
        if subject.encoder.embedding_dim != subject.original.embedding_dim:
            raise ConfigError(
                f"RUN {subject.run.name!r}: expected embeddings of one width to compare, found "
                f"{subject.encoder.embedding_dim} from {subject.encoder.spec!r} and "
                f"{subject.original.embedding_dim} from the original {subject.original.spec!r}"
            )
        _check_hashes(subject, replaced=config.original is not None)
    return subjects


def _check_hashes(subject: Subject, replaced: bool) -> None:
    """Weights that changed since the training are another encoder under the same name."""
    pairs = [(subject.encoder, subject.run.encoder_sha256)]
    if not replaced:
        pairs.append((subject.original, subject.run.original_sha256))
    for encoder, recorded in pairs:
        if recorded is not None and encoder.sha256 != recorded:
            warn(
                f"RUN {subject.run.name!r}: the weights of {encoder.spec} are not those the training saw (sha256 "
                f"{encoder.sha256[:12]} now, {recorded[:12]} then)"
            )


def _add_heads(config: EvaluateConfig, subjects: Sequence[Subject], source: Source, device: torch.device) -> None:
    labelled = any(sample.label is not None for sample in source.samples)
    heads = make_heads(config, [subject.encoder for subject in subjects])
    if heads is None:
        if labelled:
            click.echo(
                "hint: the images have labels; add --head FILE.safetensors|timm:…|open_clip:… for accuracies, or "
                f"--head {OUTPUTS} if the encoder's outputs are logits",
                err=True,
            )
        return
    if not labelled:
        warn(f"{config.data} has no labels, so the head is not used; put the images into one folder a class")
        return
    rows: dict[int, Mapping[int, int]] = {}
    for subject, head in zip(subjects, heads, strict=True):
        if id(head) not in rows:
            rows[id(head)] = match_labels(source, head, str(config.head))
        subject.head, subject.rows = head.to(device), rows[id(head)]


def _measure(
    config: EvaluateConfig, subjects: Sequence[Subject], source: Source, settings: PGD, device: torch.device
) -> list[RejectedImage]:
    """Fill every subject's tally; returns the images that could not be used."""
    rejected: list[RejectedImage] = []
    shape = subjects[0].encoder.input_shape
    with Progress("evaluate", len(source.samples) * len(subjects), "images") as progress:
        for batch in read_batches(source, shape, config.batch_size):
            rejected += batch.rejected
            pixels = torch.from_numpy(batch.pixels).to(device).float() / 255
            for subject in subjects:
                if batch.samples:
                    _measure_batch(config, subject, batch, pixels, settings)
                progress.advance(batch.listed, note=subject.run.arm)
    if len(rejected) == len(source.samples):
        reason = f"; the first one: {rejected[0].sample}: {rejected[0].reason}" if rejected else ""
        raise SourceError(f"{config.data}: expected images, found none that can be used of {len(rejected)}{reason}")
    if rejected:
        warn(
            f"{len(rejected)} of {len(source.samples)} images could not be used, e.g. {rejected[0].sample}: "
            f"{rejected[0].reason}; --json and --output list them all"
        )
    return rejected


def _measure_batch(config: EvaluateConfig, subject: Subject, batch: Batch, pixels: Tensor, settings: PGD) -> None:
    started = time.monotonic()
    tally, samples = subject.tally, batch.samples
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
    except torch.cuda.OutOfMemoryError:
        raise DatamergeError(
            f"batch_size: {config.batch_size} images with gradients do not fit the memory of {pixels.device}; try "
            f"--batch-size {max(1, config.batch_size // 4)}"
        ) from None
    tally.seconds += time.monotonic() - started


def _result(
    config: EvaluateConfig,
    settings: PGD,
    subject: Subject,
    source: Source,
    rejected: Sequence[RejectedImage],
) -> Evaluation:
    run, tally = subject.run, subject.tally
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
        epsilon=config.epsilon,
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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} cannot be used here ({reason}); try --device cpu") from None
    return device


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Let torch use so many CPU threads; a caller from Python gets its own number back."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
