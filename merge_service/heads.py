"""The class head of a merge, and the source's labels as rows of the head."""

from __future__ import annotations

from datamerge.encoders import Head, load_head
from datamerge.encoders.classes import Classes, match_classes, read_names
from datamerge.encoders.runs import ResolvedEncoder
from datamerge.sources import Source
from merge_service.config import MergeConfig


def named_head(config: MergeConfig, encoder: ResolvedEncoder | None) -> Head | None:
    """The class head that the settings name, if they name one.

    A text tower runs on the CPU, once per machine, as its head is cached. On a GPU this process would hold half a
    gigabyte while the workers run, and lock them out of a GPU that admits one process.

    Raises:
        ConfigError: there is no such head, or it takes embeddings of another width than the encoder's.
    """
    if config.head is None:
        return None
    names = read_names(config.class_names)
    head = load_head(config.head, names)
    head.names = names or head.names
    if encoder is not None:
        head.check_width(encoder.encoder.embedding_dim, repr(config.head))
    return head


def with_labels_of_head(
    config: MergeConfig, source: Source, encoder: ResolvedEncoder | None, head: Head | None
) -> Source:
    """The source with the head's rows as labels, matched by name where both have names.

    Raises:
        ConfigError: the source has classes that the head lacks.
    """
    attacked = encoder if config.objective == "cross_entropy" and config.attacks else None
    if head is None and attacked is None:
        return source
    if head is not None:
        rows = Classes(head.names, len(head.weight), f"head {config.head!r}")
    elif attacked is not None:
        rows = Classes((), attacked.encoder.embedding_dim, f"the outputs of {attacked.encoder.spec}")
    used = set(source.samples.used_labels())
    classes = Classes(source.class_names, len(source.class_names), source.url)
    remedy = "use another `head`, or name its rows as the source does with `class_names`"
    match = match_classes(used, classes, rows, "head", remedy)
    return source.relabelled(match.rows, match.names) if any(match.rows[label] != label for label in used) else source
