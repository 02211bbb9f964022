"""The encoders that the settings of a merge name."""

from __future__ import annotations

from typing import Literal

from datamerge.encoders import refusals_about
from datamerge.encoders.runs import ResolvedEncoder, resolve
from merge_service.config import MergeConfig
from storage_schemas import ConfigError


def named_encoder(
    config: MergeConfig, setting: Literal["encoder", "target_encoder", "preprocessing_of"]
) -> ResolvedEncoder | None:
    """The encoder that a setting names, if it names one.

    Raises:
        ConfigError: see `resolve`; the error is about that setting.
    """
    named: str | None = getattr(config, setting)
    with refusals_about(setting):
        return resolve(named, image_size=config.image_size) if named is not None else None


def check_pair(encoder: ResolvedEncoder | None, target: ResolvedEncoder | None) -> None:
    """Check that the attacked encoder and that of the targets take the same pixels and have embeddings of one width.

    Raises:
        ConfigError: their pixels or widths differ.
    """
    if encoder is None or target is None:
        return
    mine, other = encoder.encoder, target.encoder
    # The normalisation may differ: each encoder applies its own to the same pixels.
    if different := other.preprocessing.differences(mine.preprocessing, normalised=False):
        raise ConfigError(
            f"target_encoder: expected the pixels of the attacked encoder, found {'; '.join(different)}; choose one "
            "that takes the same pixels"
        )
    if mine.embedding_dim != other.embedding_dim:
        raise ConfigError(
            f"target_encoder: expected embeddings of width {mine.embedding_dim}, as the attacked encoder's, found "
            f"{other.embedding_dim}; choose another one"
        )
