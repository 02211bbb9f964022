"""`datamerge evaluate` without a sub-command: embedding loss and accuracy at once, clean and under PGD.

The quick look at a training: one radius, few steps, the image that PGD ends at. Numbers to publish come from the
stronger attacks of the other parts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from datamerge.attacks import PGD
from datamerge.encoders import pick_device
from datamerge.evaluation.config import EvaluateConfig
from datamerge.evaluation.encoders_under_test import Subject, load_subjects, numerics
from datamerge.evaluation.labels import OUTPUTS, classify, head_sha256, make_heads
from datamerge.evaluation.measures import (
    CLEAN_LOSS,
    TOP_1,
    Broken,
    Classifier,
    LabelledBatch,
    Measured,
    classifications,
    embedding_losses,
)
from datamerge.evaluation.pictures import PICTURES, Album, spread
from datamerge.evaluation.results import ArmResult, mean_score, rate_score
from datamerge.evaluation.runs import read_run
from datamerge.evaluation.store import PREPROCESSING, ArmFolder
from datamerge.evaluation.study import Measurements, StudyRow, open_sample, run_study
from datamerge.evaluation.tables import Results
from datamerge.runtime.messages import say, warn
from datamerge.sources import Sample, Source

PART = "pgd"


def evaluate(config: EvaluateConfig) -> Results:
    """Measure encoders on raw images, clean and under attack; one result per run, in the order given.

    Scores are `loss clean`, `loss adv.` and, with a head and labelled images, `accuracy clean`, `accuracy robust`.

    Raises:
        ConfigError: runs, head, labels or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a loss that is not finite, or a batch that does not fit the device.
    """
    ((radius, attack),) = config.attacks().items()
    device = pick_device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_sample(config)
    subjects = load_subjects(runs, device, config.original, config.image_size)
    classifiers = _classifiers(config, subjects, source)
    shown = spread(source, config.pictures)
    rows = [
        StudyRow(
            subject,
            {
                **{f"original_{name}": value for name, value in subject.original.identity.items()},
                f"original_{PREPROCESSING}": subject.original.preprocessing.record(),
                "head": None if classifier is None else head_sha256(classifier.head),
            },
            partial(
                _measure,
                subject,
                classifier,
                _album(config, subject, classifier, shown),
                attacks={radius: attack},
                seed=config.seed,
                restarts=config.restarts,
                precision=config.precision,
            ),
        )
        for subject, classifier in zip(subjects, classifiers, strict=True)
    ]
    with numerics(config.threads, device):
        studied = run_study(config, PART, rows, source)
    return Results(_result(config, attack, one, source) for one in studied)


def _classifiers(config: EvaluateConfig, subjects: Sequence[Subject], source: Source) -> Sequence[Classifier | None]:
    """The classifier of each encoder's embeddings; None, with a message, where head or labels are missing."""
    encoders = [subject.encoder for subject in subjects]
    heads = make_heads(config.head, config.class_names, encoders) if config.head is not None else []
    labelled = bool(source.samples.used_labels())
    if heads and labelled:
        return classify(encoders, heads, source, str(config.head))
    if labelled:
        say(
            "hint: the images have labels; a head gives accuracies: a .safetensors file, timm:…, open_clip:…, or "
            f"`{OUTPUTS}` if the encoder's outputs are logits"
        )
    if heads:
        warn(
            f"{source.url} has no labels{source.why}, so the head is not used; put the images into one folder a class"
        )
    return [None] * len(subjects)


def _folder(config: EvaluateConfig, subject: Subject) -> ArmFolder | None:
    return None if config.output is None else ArmFolder(config.output, PART, subject.run.name, subject.run.arm)


def _album(
    config: EvaluateConfig, subject: Subject, classifier: Classifier | None, shown: Collection[str]
) -> Album | None:
    """The album of the images with these keys; None where nothing is stored or classified."""
    folder = _folder(config, subject)
    return None if folder is None or classifier is None else Album(folder, shown, classifier.head.names)


def _measure(
    subject: Subject,
    classifier: Classifier | None,
    album: Album | None,
    pixels: Tensor,
    samples: Sequence[Sample],
    **how: Any,
) -> Measured:
    columns = embedding_losses(subject.encoder, subject.original, pixels, samples, **how)
    labelled = classifier and LabelledBatch.of(subject.encoder, classifier, pixels, samples)
    if labelled:
        broken: Broken = {}
        classified = classifications(labelled, **how, broken=broken)
        columns |= {f"accuracy {name}": hits for name, hits in classified.items()}
        if album is not None:
            columns[PICTURES] = album.keep(labelled, broken)
    return columns


def _result(config: EvaluateConfig, attack: PGD, found: Measurements, source: Source) -> ArmResult:
    radius, columns = str(config.epsilon), found.columns
    folder = _folder(config, found.subject)
    scores = [mean_score("loss clean", columns[CLEAN_LOSS]), mean_score("loss adv.", columns[radius])]
    if f"accuracy {TOP_1}" in columns:
        scores.append(rate_score("accuracy clean", columns[f"accuracy {TOP_1}"]))
        scores.append(rate_score("accuracy robust", columns[f"accuracy {radius}"]))
    return found.result(
        PART,
        config,
        scores,
        note="loss: squared distance to the original encoder's embedding. "
        f"Attack: PGD, epsilon {radius}, {attack.steps} steps of {attack.step_size}, seed {config.seed}. "
        f"Images: {source.url}",
        details={
            "original": found.subject.original.spec,
            "original_sha256": found.subject.original.sha256,
            "step_size": str(attack.step_size),
            "data_fingerprint": source.fingerprint,
            **({} if folder is None else {"folder": str(folder.path), PICTURES: columns.get(PICTURES, [])}),
        },
    )
