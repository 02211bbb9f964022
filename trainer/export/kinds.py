"""Kinds of encoders that an export supports, and the description of an exported folder."""

from __future__ import annotations

from dataclasses import dataclass

from datamerge.encoders import Encoder
from datamerge.encoders.specs import split_spec
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS


@dataclass(frozen=True)
class Folder:
    """Description of an exported folder, for its model card.

    Attributes:
        usage: lines of Python that load the encoder and embed photo.jpg.
        preprocessing: how the library preprocesses a photo.
        note: sentences on the contents of the folder, or on differences in preprocessing.
    """

    usage: str
    preprocessing: Preprocessing
    note: str = ""


def check_kind(encoder: Encoder, target: str, *kinds: str) -> str:
    """The encoder's kind, which must be one of `kinds`.

    Raises:
        ConfigError: the target does not support this kind; the message names one that does.
    """
    kind = split_spec(encoder.spec).kind
    if kind not in kinds:
        other = f'`to="{kind}"`, or ' if kind in ("open_clip", "hf", "timm") else ""
        raise ConfigError(
            f"to: {target} expects an encoder of kind {' or '.join(kinds)}, found {encoder.spec!r}; use {other}the "
            f"run's {WEIGHTS}, which datamerge reads"
        )
    return kind
