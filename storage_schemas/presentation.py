"""The files with which an artifact presents itself: dataset card, Croissant metadata, contact sheet."""

from __future__ import annotations

from storage_schemas.artifact import Artifact
from storage_schemas.card import dataset_card
from storage_schemas.croissant import croissant
from storage_schemas.preview import contact_sheet


def presentation_files(artifact: Artifact) -> dict[str, bytes]:
    """`README.md`, `croissant.json` and, unless the artifact is empty, `preview.png`; from its content alone."""
    files = {"README.md": dataset_card(artifact).encode(), "croissant.json": croissant(artifact)}
    if len(artifact):
        files["preview.png"] = contact_sheet(artifact)
    return files
