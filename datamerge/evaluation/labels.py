"""Class heads for accuracies, and labels that mean the same classes as the head's rows.

Shapes: K embedding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from datamerge.encoders import Encoder, Head, load_head, parse_spec, refusals_about
from datamerge.encoders.classes import Classes, match_classes, read_names
from datamerge.encoders.heads import head_spec
from datamerge.encoders.specs import KINDS
from datamerge.evaluation.measures import Classifier
from datamerge.runtime.messages import warn
from datamerge.sources import Source
from storage_schemas import ConfigError, SchemaError

OUTPUTS = "outputs"


def make_heads(
    spec: str,
    class_names: str | None,
    encoders: Sequence[Encoder],
    templates: Sequence[str] = (),
    shelf: Path | None = None,
) -> list[Head]:
    """The head behind each encoder.

    Args:
        spec: of the head, or `outputs`.
        class_names: file with the classes in the head's order, or `imagenet`.
        encoders: one head is made for each, on its device.
        templates: prompts of zero-shot heads.
        shelf: folder in which zero-shot heads are kept.

    Raises:
        ConfigError: no such head, or one that does not take the encoders' embeddings.
    """
    names = read_names(class_names)
    if spec == OUTPUTS:
        heads = [Head(torch.eye(encoder.embedding_dim), names=names) for encoder in encoders]
    else:
        with refusals_about("head"):
            spec = head_spec(spec)
        try:
            head = load_head(spec, names, templates, device=str(encoders[0].mean.device), shelf=shelf)
        except SchemaError as error:
            raise ConfigError(f"head: {error}") from None
        _warn_if_random(spec)
        head.names = names or head.names
        heads = [head] * len(encoders)
    for head, encoder in zip(heads, encoders, strict=True):
        head.check_width(encoder.embedding_dim, f"{spec!r} for the encoder {encoder.spec!r}")
        if names and len(names) != len(head.weight):
            raise ConfigError(
                f"class_names: expected the names of the head's {len(head.weight)} classes, found {len(names)} in "
                f"{class_names}"
            )
    return heads


def classify(encoders: Sequence[Encoder], heads: Sequence[Head], source: Source, where: str) -> list[Classifier]:
    """Each head behind its encoder, with its rows for the source's labels.

    Args:
        encoders: whose embeddings the heads take.
        heads: one per encoder.
        source: whose labels are matched with the heads' classes.
        where: name of the head in error messages.

    Raises:
        ConfigError: the head has no row for a label.
    """
    rows: dict[int, Mapping[int, int]] = {}  # by head, which several encoders may share
    for head in heads:
        if id(head) not in rows:
            rows[id(head)] = match_labels(source, head, where)
    return [
        Classifier(head.to(encoder.mean.device), rows[id(head)])
        for encoder, head in zip(encoders, heads, strict=True)
    ]


def match_labels(source: Source, head: Head, where: str) -> Mapping[int, int]:
    """Row of the head for each label that occurs in the source.

    Classes are matched by name if both have names, so that a few class folders can be measured with a head of a
    thousand classes, and by position otherwise.

    Raises:
        ConfigError: the head has no row for a label.
    """
    used = set(source.samples.used_labels())
    classes = Classes(source.class_names, len(source.class_names), source.url)
    rows = Classes(head.names, len(head.weight), f"head {where!r}")
    remedy = "choose a head of these classes, or name its rows as the source does with `class_names`"
    return match_classes(used, classes, rows, "head", remedy).rows


def head_sha256(head: Head) -> str:
    """SHA-256 of the head as a file, which identifies it."""
    return hashlib.sha256(head.to_bytes()).hexdigest()


def _warn_if_random(text: str) -> None:
    if text.partition(":")[0] in KINDS:
        spec = parse_spec(text)
        if not spec.has_weights and spec.checkpoint is None:
            warn(f"head {text} has random weights; nobody has trained it, its accuracies mean nothing")
