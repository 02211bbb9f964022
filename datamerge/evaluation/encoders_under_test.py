"""The encoders under evaluation, loaded onto the device, with what they are compared to and classified by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import click
import torch

from datamerge.attacks import arithmetic
from datamerge.encoders import Encoder, Head, load_encoder
from datamerge.evaluation.labels import OUTPUTS, match_labels
from datamerge.evaluation.runs import Run, warn
from datamerge.runtime import quiet
from datamerge.sources import Source
from storage_schemas import ConfigError


@dataclass
class Subject:
    """One encoder under evaluation.

    Attributes:
        run: where it comes from.
        encoder: f, on the device.
        original: the frozen reference, on the device; `encoder` itself for a baseline.
        head: behind the encoder, None without accuracies.
        rows: row of the head for each label of the source.
    """

    run: Run
    encoder: Encoder
    original: Encoder
    head: Head | None = None
    rows: Mapping[int, int] = field(default_factory=dict)


def load_subjects(runs: Sequence[Run], device: torch.device, original: str | None = None) -> list[Subject]:
    """Load each network once, however many runs refer to it.

    Args:
        runs: what to evaluate.
        device: where to.
        original: reference instead of what each run started from.

    Raises:
        ConfigError: encoders that take other pixels, or have other embeddings than their reference.
    """
    loaded: dict[str, Encoder] = {}

    def load(spec: str) -> Encoder:
        if spec not in loaded:
            loaded[spec] = load_encoder(spec, str(device))
            if loaded[spec].random_weights:
                warn(f"encoder {spec} has random weights; nobody has trained it")
        return loaded[spec]

    subjects = [Subject(run, load(run.encoder), load(original or run.original)) for run in runs]
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
        _check_hashes(subject, replaced=original is not None)
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


def add_heads(subjects: Sequence[Subject], heads: Sequence[Head] | None, source: Source, where: str) -> None:
    """Put each head behind its encoder, if the source has labels; says so if it does not go together.

    Args:
        subjects: to complete.
        heads: one per subject, None if none was asked for.
        source: whose labels are matched with the heads' classes.
        where: how errors call the head.

    Raises:
        ConfigError: a label that no row of the head stands for.
    """
    labelled = any(sample.label is not None for sample in source.samples)
    if heads is None:
        if labelled and not quiet():
            click.echo(
                "hint: the images have labels; add --head FILE.safetensors|timm:…|open_clip:… for accuracies, or "
                f"--head {OUTPUTS} if the encoder's outputs are logits",
                err=True,
            )
        return
    if not labelled:
        warn(f"{source.url} has no labels, so the head is not used; put the images into one folder a class")
        return
    rows: dict[int, Mapping[int, int]] = {}
    for subject, head in zip(subjects, heads, strict=True):
        if id(head) not in rows:
            rows[id(head)] = match_labels(source, head, where)
        subject.head, subject.rows = head.to(subject.encoder.mean.device), rows[id(head)]


@contextmanager
def numerics(threads: int | None, device: torch.device) -> Iterator[None]:
    """What all passes of an evaluation compute with; a caller from Python gets its own settings back.

    Args:
        threads: of the CPU; as many as torch has now if None.
        device: where the encoders are.
    """
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with arithmetic(device):
            yield
    finally:
        torch.set_num_threads(before)
