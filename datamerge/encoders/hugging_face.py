"""Vision models of Hugging Face transformers."""

from __future__ import annotations

from datamerge.encoders.building import Built
from datamerge.encoders.specs import EncoderSpec
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """A vision model of Hugging Face transformers."""
    raise ConfigError(f"encoder: hf: models are not read yet, found {spec}")
