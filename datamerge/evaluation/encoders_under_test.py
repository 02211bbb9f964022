"""The encoders under evaluation and their frozen references, loaded onto the device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from datamerge.attacks import arithmetic
from datamerge.encoders import Encoder, load_encoder, refusals_about, with_image_size
from datamerge.evaluation.runs import Run
from datamerge.runtime.messages import warn
from datamerge.runtime.threads import torch_threads
from storage_schemas import ConfigError


@dataclass(frozen=True)
class Subject:
    """One encoder under evaluation.

    Attributes:
        run: the run or spec that it comes from.
        encoder: f, on the device.
        original: the frozen reference, on the device; `encoder` itself for a baseline.
    """

    run: Run
    encoder: Encoder
    original: Encoder


def load_subjects(
    runs: Sequence[Run], device: torch.device, original: str | None = None, image_size: int | None = None
) -> list[Subject]:
    """Load each network once, however many runs refer to it.

    Args:
        runs: what to evaluate.
        device: where the encoders are loaded.
        original: reference for all runs; the encoder that each run started from if None.
        image_size: side of the input of encoders that are given as specs, in pixels; their own if None.

    Raises:
        ConfigError: an encoder takes other pixels than its reference, or has embeddings of another width.
    """
    with refusals_about("runs"):
        runs = [_sized(run, image_size) for run in runs]
    if original is not None:
        with refusals_about("original"):
            original = with_image_size(original, image_size)
    loaded: dict[str, Encoder] = {}

    def load(spec: str, setting: str) -> Encoder:
        if spec not in loaded:
            with refusals_about(setting):
                loaded[spec] = load_trained(spec, device)
        return loaded[spec]

    subjects = [
        Subject(
            run,
            load(run.encoder, "runs"),
            load(run.original, "runs") if original is None else load(original, "original"),
        )
        for run in runs
    ]
    for subject in subjects:
        # Rows may take different pixels, but an encoder and its reference see the same ones.
        mine, reference = subject.encoder.preprocessing, subject.original.preprocessing
        if different := mine.differences(reference, normalised=False):
            raise ConfigError(
                f"runs: expected {subject.run.name!r} to take the pixels of the original {subject.original.spec!r}, "
                f"found {'; '.join(different)}; name another `original`"
            )
        if subject.encoder.embedding_dim != subject.original.embedding_dim:
            raise ConfigError(
                f"runs: expected embeddings of one width to compare in {subject.run.name!r}, found "
                f"{subject.encoder.embedding_dim} from {subject.encoder.spec!r} and "
                f"{subject.original.embedding_dim} from the original {subject.original.spec!r}"
            )
        if subject.run.summary is not None:
            check_weights(subject.run, subject.encoder, subject.run.summary.encoder_sha256)
            if original is None:
                check_weights(subject.run, subject.original, subject.run.summary.original_sha256)
    return subjects


def _sized(run: Run, image_size: int | None) -> Run:
    """The same run at another size of the input, if it is a spec.

    Raises:
        ConfigError: a training run, whose encoder keeps the size that it was trained at.
    """
    if image_size is None:
        return run
    if run.summary is not None:
        raise ConfigError(
            f"image_size: expected encoder specs to set the input size of, found the run {run.name!r}, which has the "
            "one that it was trained at; evaluate it without `image_size`"
        )
    return replace(
        run, encoder=with_image_size(run.encoder, image_size), original=with_image_size(run.original, image_size)
    )


def load_trained(spec: str, device: torch.device) -> Encoder:
    """Load an encoder; warns if its weights are random."""
    encoder = load_encoder(spec, str(device))
    if encoder.random_weights:
        warn(f"encoder {spec} has random weights; nobody has trained it")
    return encoder


def check_weights(run: Run, encoder: Encoder, recorded: str) -> None:
    """Warn if the weights changed since the training: they are another encoder under the same name."""
    if encoder.sha256 != recorded:
        warn(
            f"run {run.name!r}: the weights of {encoder.spec} are not those the training saw (sha256 "
            f"{encoder.sha256[:12]} now, {recorded[:12]} then)"
        )


@contextmanager
def numerics(threads: int | None, device: torch.device) -> Iterator[None]:
    """Set the number of threads and the arithmetic of an evaluation, and restore the caller's afterwards.

    Args:
        threads: number of CPU threads; torch's present number if None.
        device: where the encoders are.
    """
    with torch_threads(threads), arithmetic(device):
        yield
