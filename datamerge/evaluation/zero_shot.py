"""`datamerge evaluate zero-shot`: top-1 and top-5 accuracy, clean and under attack at several radii.

Images are classified by the text tower of the encoder that a run started from, as in FARE, or by a given head. Radii
are attacked in ascending order, each on the images robust at the radius before, since a ball contains smaller ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from datamerge.attacks import check_masking
from datamerge.encoders import Head, pick_device, refusals_about
from datamerge.encoders.heads import ZERO_SHOT, head_spec
from datamerge.evaluation.config import ZeroShotConfig
from datamerge.evaluation.encoders_under_test import Subject, load_subjects, numerics
from datamerge.evaluation.labels import classify, head_sha256, make_heads
from datamerge.evaluation.measures import TOP_1, TOP_5, Broken, Classifier, LabelledBatch, Measured, classifications
from datamerge.evaluation.pictures import PICTURES, Album, spread
from datamerge.evaluation.results import ArmResult, rate_score
from datamerge.evaluation.runs import read_run
from datamerge.evaluation.store import ArmFolder
from datamerge.evaluation.study import Measurements, StudyRow, open_sample, run_study
from datamerge.evaluation.tables import Results
from datamerge.runtime import read_lines
from datamerge.runtime.messages import warn
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import Sample, Source
from storage_schemas import ConfigError, shortened
from storage_schemas.access.local_paths import user_path

PART = "zero-shot"
MASKING_IMAGES = 32


def evaluate_zero_shot(config: ZeroShotConfig) -> Results:
    """Accuracies of every run; one result per run, in the order given.

    Raises:
        ConfigError: runs, head, labels or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a logit that is not finite, or a batch that does not fit the device.
    """
    config.attacks()  # refuses wrong radii before the encoders are loaded
    templates = read_templates(config.templates)
    device = pick_device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_sample(config)
    if not source.samples.used_labels():
        raise ConfigError(
            f"data: expected images with labels, found none at {config.data}{source.why}; one folder a "
            "class gives them"
        )
    subjects = load_subjects(runs, device, image_size=config.image_size)
    specs = [_head_spec(config, subject) for subject in subjects]
    cache: dict[str, Head] = {}
    first = set(source.samples[: config.batch_size].keys) if config.check_masking else set()
    shown = spread(source, config.pictures)
    rows = []
    for subject, spec in zip(subjects, specs, strict=True):
        head = _head(config, spec, subject, templates, cache)
        (classifier,) = classify([subject.encoder], [head], source, spec)
        identity = {"masking": config.check_masking, "head": head_sha256(head)}
        album = Album(_folder(config, subject), shown, head.names)
        rows.append(StudyRow(subject, identity, _measure(config, subject, classifier, first, album)))
    with numerics(config.threads, device):
        studied = run_study(config, PART, rows, source, attack=config.attack)
    return Results(_result(config, spec, one, source) for spec, one in zip(specs, studied, strict=True))


def read_templates(text: str) -> list[str]:
    """Prompts with {} for the class name: `openai` (empty: the head's default), `simple`, or the lines of a file.

    Raises:
        ConfigError: there is no such file, or a line does not have {} exactly once.
    """
    if text == "openai":
        return []
    if text == "simple":
        make_torchvision_importable()
        import open_clip

        return [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    templates = read_lines(text, "templates", "openai, simple or a text file with one prompt a line")
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong:
        raise ConfigError(
            f"templates: expected one prompt a line with {{}} for the name in {text}, found {shortened(wrong[0])}"
        )
    return templates


def _folder(config: ZeroShotConfig, subject: Subject) -> ArmFolder:
    return ArmFolder(config.output, PART, subject.run.name, subject.run.arm)


def _head_spec(config: ZeroShotConfig, subject: Subject) -> str:
    with refusals_about("head"):
        spec = head_spec(config.head or subject.run.name)
    zero_shot = spec.partition(":")[0] in ZERO_SHOT
    if config.head is None and not zero_shot:
        raise ConfigError(
            f"head: expected one for {subject.run.name!r}, since {spec!r} is no open_clip: or hf: encoder, which "
            "have text towers; found none; choose a .safetensors file, timm:… or `outputs`"
        )
    if zero_shot and config.class_names is None:
        raise ConfigError(
            f"class_names: expected a file with one name a line, or imagenet, for the head {spec!r}; found none"
        )
    return spec


def _head(
    config: ZeroShotConfig, spec: str, subject: Subject, templates: Sequence[str], cache: dict[str, Head]
) -> Head:
    """The head of a subject; heads of text towers are made once and also kept in the output folder."""
    if spec.partition(":")[0] not in ZERO_SHOT:
        return make_heads(spec, config.class_names, [subject.encoder])[0]
    if spec not in cache:
        shelf = user_path(config.output).absolute() / "heads"
        (cache[spec],) = make_heads(spec, config.class_names, [subject.encoder], templates, shelf)
    cache[spec].check_width(subject.encoder.embedding_dim, f"{spec!r} for the encoder {subject.encoder.spec!r}")
    return cache[spec]


def _measure(
    config: ZeroShotConfig, subject: Subject, classifier: Classifier, checked: Collection[str], album: Album
) -> Callable[[Tensor, Sequence[Sample]], Measured]:
    """The measure of one row; masked gradients are looked for in the batch that begins with a sample of `checked`."""
    attacks = config.attacks()

    def measure(pixels: Tensor, samples: Sequence[Sample]) -> Measured:
        labelled = LabelledBatch.of(subject.encoder, classifier, pixels, samples)
        if labelled is None:
            return {}
        targeted = config.attack == "autoattack"
        broken: Broken = {}
        columns = classifications(
            labelled,
            attacks=attacks,
            seed=config.seed,
            restarts=config.restarts,
            targeted=targeted,
            precision=config.precision,
            broken=broken,
        )
        columns[PICTURES] = album.keep(labelled, broken)
        if samples[0].key in checked:
            columns["masking"] = _masking(config, labelled, columns)
        return columns

    return measure


def _masking(config: ZeroShotConfig, batch: LabelledBatch, columns: Measured) -> list[str]:
    """Warnings of the check on the first images of the batch, at the smallest radius."""
    text, settings = next(iter(config.attacks().items()))
    few = slice(0, MASKING_IMAGES)
    found = check_masking(
        batch.model,
        batch.pixels[few],
        batch.labels[few],
        settings,
        torch.tensor(columns[f"{text} APGD-CE"][few]),
        [sample.key for sample in batch.samples[few]],
        config.seed,
        config.precision,
    )
    return list(found)


def _result(config: ZeroShotConfig, head: str, found: Measurements, source: Source) -> ArmResult:
    columns, radii = found.columns, list(config.attacks())
    if not columns.get(TOP_1):
        raise ConfigError(f"data: expected images of the head's classes, found none at {config.data}")
    count = len(columns[TOP_1])
    warnings = sorted(set(columns.get("masking", [])))
    for message in warnings:
        warn(f"{found.subject.run.arm}: {message}")
    return found.result(
        PART,
        config,
        [rate_score("top-1 clean", columns[TOP_1]), rate_score("top-5 clean", columns[TOP_5])]
        + [rate_score(f"top-1 ε={text}", columns[text]) for text in radii],
        images=count,
        warnings=warnings,
        details={
            "head": head,
            "after_cross_entropy": {text: 100 * sum(columns[f"{text} APGD-CE"]) / count for text in radii},
            "data_fingerprint": source.fingerprint,
            "folder": str(_folder(config, found.subject).path),
            PICTURES: columns.get(PICTURES, []),
        },
    )
