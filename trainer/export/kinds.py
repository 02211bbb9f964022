"""Which kind of encoder goes where, and what its new folder is said to hold."""

from __future__ import annotations

from dataclasses import dataclass

from datamerge.encoders import Encoder
from datamerge.encoders.specs import split_spec
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS


@dataclass(frozen=True)
class Folder:
    """What was written for a library.

    Attributes:
        usage: lines of Python that load it and embed photo.jpg.
        preprocessing: what the library makes of a photo.
        note: sentences on what is there, or is done otherwise.
    """

    usage: str
    preprocessing: Preprocessing
    note: str = ""


def check_kind(encoder: Encoder, target: str, *kinds: str) -> str:
    """The encoder's kind, one of those that a target has a form for.

    Raises:
        ConfigError: another kind; says where that one can go.
    """
    kind = split_spec(encoder.spec).kind
    if kind not in kinds:
        other = f'`to="{kind}"`, or ' if kind in ("open_clip", "hf", "timm") else ""
        raise ConfigError(
            f"to: {target} expects an encoder of kind {' or '.join(kinds)}, found {encoder.spec!r}; use {other}the "
            f"run's {WEIGHTS}, which datamerge reads"
        )
    return kind
