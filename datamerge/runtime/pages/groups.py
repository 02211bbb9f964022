"""Groups of an artifact as rows of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from datamerge.runtime.pages.page import Strip, Tile
from storage_schemas import Artifact
from storage_schemas.card.contact_sheet import ROWS, caption, choose, tiles


def group_strips(artifact: Artifact, groups: int = ROWS, keys: Sequence[str] = ()) -> list[Strip]:
    """Clean image, members, mean, amplified difference and variance of some groups, as far as they are stored.

    Args:
        artifact: the groups.
        groups: how many to draw, spread evenly over the artifact.
        keys: the groups to draw instead.

    Raises:
        ConfigError: an unknown key, no group to draw, or an empty artifact.
    """
    return [
        Strip([Tile(tile.name, tile.pixels, tile.scale) for tile in tiles(record)], caption(record))
        for record in choose(artifact, groups, keys)
    ]
