"""`datamerge evaluate zero-shot`: top-1 and top-5 accuracy, clean and under attack at several radii.

A run's encoder is classified by the text tower of what it started from, as FARE does; or by any given head. Radii are
attacked in ascending order and only what survived the last one, since every ball holds the smaller ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamerge.attacks import auto_attack, check_masking, sample_generators
from datamerge.encoders import Head, head_from_arrays, parse_spec, pick_device
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from datamerge.evaluation.config import ZeroShotConfig
from datamerge.evaluation.encoders_under_test import Subject, add_heads, load_subjects, numerics
from datamerge.evaluation.labels import make_heads, read_names
from datamerge.evaluation.metrics import check_finite
from datamerge.evaluation.results import ArmResult, Score, rate_score
from datamerge.evaluation.runs import read_run, warn
from datamerge.evaluation.store import write_result
from datamerge.evaluation.study import Measured, Study, open_sample, run_study
from datamerge.runtime import read_lines
from datamerge.sources import Sample, Source
from storage_schemas import ConfigError, Location, shortened
from storage_schemas.artifact import parse_head

PART = "zero-shot"
MASKING_IMAGES = 32


def evaluate_zero_shot(config: ZeroShotConfig) -> list[ArmResult]:
    """Accuracies of every run; one result per run, in the order given.

    Raises:
        ConfigError: runs, head, labels or settings that do not go together, or cannot be read.
        SourceError: no usable image at `config.data`.
        DatamergeError: a logit that is not finite, or a batch that does not fit the device.
    """
    attacks = config.attacks()
    templates = read_templates(config.templates)
    device = pick_device(config.device)
    runs = [read_run(text) for text in config.runs]
    source = open_sample(config)
    if all(sample.label is None for sample in source.samples):
        raise ConfigError(f"{config.data}: expected images with labels, found none; one folder a class gives them")
    subjects = load_subjects(runs, device)
    specs = [_head_spec(config, subject) for subject in subjects]
    cache: dict[str, Head] = {}
    for subject, spec in zip(subjects, specs, strict=True):
        add_heads([subject], [_head(config, spec, subject, templates, cache)], source, spec)
    own = [{"masking": config.check_masking, "head": _digest(subject)} for subject in subjects]
    first = {sample.key for sample in source.samples[: config.batch_size]} if config.check_masking else set()

    def measure(subject: Subject, pixels: Tensor, samples: Sequence[Sample]) -> Measured:
        return _measure(config, subject, pixels, samples, check=samples[0].key in first)

    with numerics(config.threads, device):
        studies = run_study(config, PART, subjects, own, source, measure, attack=config.attack)
    return [
        _result(config, subject, spec, study, list(attacks), source)
        for subject, spec, study in zip(subjects, specs, studies, strict=True)
    ]


def read_templates(text: str) -> list[str]:
    """Prompts with {} for the class name: `openai` (empty: the head's default), `simple`, or the lines of a file.

    Raises:
        ConfigError: no such file, or a line without {}.
    """
    if text == "openai":
        return []
    if text == "simple":
        make_torchvision_importable()
        import open_clip

        return [template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES]
    templates = read_lines(text, "openai, simple or a text file with one prompt a line")
    wrong = [line for line in templates if line.count("{}") != 1]
    if wrong:
        raise ConfigError(f"{text}: expected one prompt a line with {{}} for the name, found {shortened(wrong[0])}")
    return templates


def _head_spec(config: ZeroShotConfig, subject: Subject) -> str:
    spec = config.head or subject.run.original
    if config.head is None and not spec.startswith("open_clip:"):
        raise ConfigError(
            f"RUN {subject.run.name!r}: expected an open_clip encoder, which has a text tower, found {spec!r}; add "
            "--head FILE.safetensors, timm:… or outputs"
        )
    if spec.startswith("open_clip:") and config.class_names is None:
        raise ConfigError(f"head {spec!r}: expected --class-names FILE, one name a line, or imagenet; found none")
    return spec


def _head(
    config: ZeroShotConfig, spec: str, subject: Subject, templates: Sequence[str], cache: dict[str, Head]
) -> Head:
    """The head of a subject; text features come from the output folder where they were made before."""
    if not spec.startswith("open_clip:"):
        heads = make_heads(spec, config.class_names, [subject.encoder])
        assert heads is not None
        return heads[0]
    key = _text_key(config, spec, templates)
    if key not in cache:
        location = Location(Path(config.output).expanduser().absolute() / "heads")
        name = f"{key}.safetensors"
        if location.exists(name):
            arrays, names = parse_head(location.read(name), name)
            cache[key] = head_from_arrays(arrays, names)
        else:
            heads = make_heads(spec, config.class_names, [subject.encoder], templates)
            assert heads is not None
            cache[key] = heads[0]
            write_result(location, name, heads[0].to_bytes())
    cache[key].check_width(subject.encoder.embedding_dim, f"head {spec!r} for encoder {subject.encoder.spec!r}")
    return cache[key]


def _text_key(config: ZeroShotConfig, spec: str, templates: Sequence[str]) -> str:
    """What text features depend on: the tower, the names and the prompts."""
    checkpoint = Path(parse_spec(spec).checkpoint or "")
    stat = checkpoint.stat() if checkpoint.is_file() else None  # loading says it better where there is none
    parts = [spec, read_names(config.class_names), list(templates), stat and [stat.st_size, stat.st_mtime_ns]]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _digest(subject: Subject) -> str:
    assert subject.head is not None
    return hashlib.sha256(subject.head.to_bytes()).hexdigest()


def _measure(
    config: ZeroShotConfig, subject: Subject, pixels: Tensor, samples: Sequence[Sample], check: bool
) -> Measured:
    assert subject.head is not None
    model = nn.Sequential(subject.encoder, subject.head).eval()
    # Samples without a label, or of a class that the head does not know, take no part.
    chosen = [i for i, sample in enumerate(samples) if sample.label is not None and sample.label in subject.rows]
    known = [samples[index] for index in chosen]
    if not known:
        return {}
    names, pixels = [sample.name for sample in known], pixels[chosen]
    labels = torch.tensor([subject.rows[sample.label] for sample in known if sample.label is not None])
    labels = labels.to(pixels.device)
    with torch.no_grad():
        logits = model(pixels)
    check_finite(logits.sum(dim=1), names, "the sum of logits")
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    robust = torch.eq(best[:, 0], labels)
    columns: Measured = {"top-1": robust.tolist(), "top-5": (best == labels[:, None]).any(dim=1).tolist()}
    for text, settings in config.attacks().items():
        rows = torch.nonzero(robust).flatten()
        first = torch.zeros_like(robust)
        if len(rows):
            survival = auto_attack(
                model,
                pixels[rows],
                labels[rows],
                settings,
                [sample_generators(config.seed, known[row].key, 1)[0] for row in rows.tolist()],
                [names[row] for row in rows.tolist()],
                targeted=config.attack == "autoattack",
                restarts=config.restarts,
            )
            robust, first = robust.clone(), first.clone()
            robust[rows], first[rows] = survival.robust, survival.after_cross_entropy
        columns[text], columns[f"{text} APGD-CE"] = robust.tolist(), first.tolist()
    if check:
        columns["masking"] = _masking(config, model, pixels, labels, columns, known)
    return columns


def _masking(
    config: ZeroShotConfig,
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    columns: Measured,
    known: Sequence[Sample],
) -> list[Any]:
    """Warnings of the check on the first images of the batch, at the smallest radius."""
    text, settings = next(iter(config.attacks().items()))
    few = slice(0, MASKING_IMAGES)
    found = check_masking(
        model,
        pixels[few],
        labels[few],
        settings,
        torch.tensor(columns[f"{text} APGD-CE"][few]),
        [sample.key for sample in known[few]],
        config.seed,
    )
    return list(found)


def _result(
    config: ZeroShotConfig, subject: Subject, head: str, study: Study, radii: Sequence[str], source: Source
) -> ArmResult:
    columns = study.columns
    if not columns.get("top-1"):
        raise ConfigError(f"{config.data}: expected images of the head's classes, found none")
    scores: list[Score] = [rate_score("top-1 clean", columns["top-1"]), rate_score("top-5 clean", columns["top-5"])]
    scores += [rate_score(f"top-1 ε={text}", columns[text]) for text in radii]
    warnings = sorted(set(columns.get("masking", [])))
    for message in warnings:
        warn(f"{subject.run.arm}: {message}")
    return ArmResult(
        part=PART,
        run=subject.run.name,
        arm=subject.run.arm,
        encoder=subject.encoder.spec,
        encoder_sha256=subject.encoder.sha256,
        scores=scores,
        images=len(columns["top-1"]),
        seconds=study.seconds,
        warnings=warnings,
        settings=config.model_dump(mode="json"),
        details={
            "head": head,
            "after_cross_entropy": {
                text: 100 * sum(columns[f"{text} APGD-CE"]) / len(columns["top-1"]) for text in radii
            },
            "data_fingerprint": source.fingerprint,
            "rejected": [image.model_dump() for image in study.rejected],
        },
    )
