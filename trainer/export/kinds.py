"""Which kind of encoder goes where."""

from __future__ import annotations

from datamerge.encoders import Encoder
from datamerge.encoders.specs import split_spec
from storage_schemas import ConfigError
from storage_schemas.schema.run import WEIGHTS


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
