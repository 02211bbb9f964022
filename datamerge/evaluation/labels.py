"""Class heads for accuracies, and labels that mean the same classes as the head's rows.

Shapes: K embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from datamerge.encoders import Encoder, Head, load_head, parse_spec
from datamerge.encoders.specs import KINDS
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from datamerge.evaluation.runs import warn
from datamerge.runtime import read_lines
from datamerge.sources import Source
from storage_schemas import ConfigError, SchemaError

OUTPUTS = "outputs"
IMAGENET = "imagenet"


def make_heads(
    spec: str | None, class_names: str | None, encoders: Sequence[Encoder], templates: Sequence[str] = ()
) -> list[Head] | None:
    """The head behind each encoder, None where no head was asked for.

    Args:
        spec: of the head, `outputs`, or None.
        class_names: file with the classes in the head's order, or `imagenet`.
        encoders: one head each.
        templates: prompts of zero-shot heads.

    Raises:
        ConfigError: no such head, or one that does not take the encoders' embeddings.
    """
    if spec is None:
        return None
    names = read_names(class_names)
    if spec == OUTPUTS:
        heads = [Head(torch.eye(encoder.embedding_dim), names=names) for encoder in encoders]
    else:
        try:
            head = load_head(spec, names, templates)
        except SchemaError as error:
            raise ConfigError(f"head: {error}") from None
        _warn_if_random(spec)
        head.names = names or head.names
        heads = [head] * len(encoders)
    for head, encoder in zip(heads, encoders, strict=True):
        head.check_width(encoder.embedding_dim, f"head {spec!r} for encoder {encoder.spec!r}")
        if names and len(names) != len(head.weight):
            raise ConfigError(
                f"{class_names}: expected the names of the head's {len(head.weight)} classes, found {len(names)}"
            )
    return heads


def match_labels(source: Source, head: Head, where: str) -> Mapping[int, int]:
    """Row of the head for each label that occurs in the source.

    Classes are matched by name where the head knows the names of all the source's classes, so that a few class
    folders can be measured with a head of a thousand classes; by position otherwise.

    Raises:
        ConfigError: a label that no row stands for.
    """
    used = sorted({sample.label for sample in source.samples if sample.label is not None})
    rows = {name: row for row, name in enumerate(head.names)}
    named = bool(source.class_names) and len(rows) == len(head.names) and rows.keys() >= set(source.class_names)
    if named and all(0 <= label < len(source.class_names) for label in used):
        return {label: rows[source.class_names[label]] for label in used}
    classes = len(head.weight)
    outside = [label for label in used if not 0 <= label < classes]
    if outside:
        raise ConfigError(
            f"{source.url}: expected labels from 0 to {classes - 1}, the classes of head {where!r}, found label "
            f"{outside[0]}{_class_name(source, outside[0])}; choose a head of these classes"
        )
    if source.class_names and len(source.class_names) != classes:
        warn(
            f"{source.url} has {len(source.class_names)} classes and head {where!r} has {classes}: labels are "
            "taken as positions in the head, which is wrong if the source has only some of its classes; "
            "--class-names with the head's names matches them by name"
        )
    return {label: label for label in used}


def read_names(file: str | None) -> list[str]:
    """Class names of a text file, one a line, or of `imagenet`; empty without a file.

    Raises:
        ConfigError: no such file, or an empty one.
    """
    if file is None:
        return []
    return imagenet_names() if file == IMAGENET else read_lines(file, "a text file with one class name a line")


def imagenet_names() -> list[str]:
    """The 1,000 class names that open_clip ships, in label order."""
    make_torchvision_importable()
    import open_clip

    return list(open_clip.IMAGENET_CLASSNAMES)


def _warn_if_random(text: str) -> None:
    if text.partition(":")[0] in KINDS:
        spec = parse_spec(text)
        if spec.pretrained is None and spec.checkpoint is None:
            warn(f"head {text} has random weights; nobody has trained it, its accuracies mean nothing")


def _class_name(source: Source, label: int) -> str:
    return f" ({source.class_names[label]})" if 0 <= label < len(source.class_names) else ""
