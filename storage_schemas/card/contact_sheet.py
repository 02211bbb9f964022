"""A contact sheet: what the groups of an artifact look like.

One row a group, from left to right: clean (if kept), members (if kept), mean, amplified difference, variance.
The difference is mean − first member if members are kept, else mean − clean, around middle grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from storage_schemas.artifact import Artifact
from storage_schemas.display import Pixels, heat, rgb
from storage_schemas.errors import ConfigError
from storage_schemas.schema.arguments import check_count, check_list
from storage_schemas.schema.record import Record

ROWS = 8
SHOWN_MEMBERS = 4
TILE = 112
GAP, HEADER = 4, 16


class Tile(NamedTuple):
    """One picture of a group.

    Attributes:
        name: what it shows.
        pixels: uint8 [H, W, 3].
        scale: what its colours stand for, empty where they are the image's own.
    """

    name: str
    pixels: Pixels
    scale: str = ""


def contact_sheet(artifact: Artifact, groups: int = ROWS, keys: Sequence[str] = ()) -> bytes:
    """A PNG of `groups` groups spread evenly over the artifact, or of the groups with the given keys.

    Raises:
        ConfigError: an unknown key, no group to draw, or an empty artifact.
    """
    rows = [(caption(record), tiles(record)) for record in choose(artifact, groups, keys)]
    columns = [tile.name for tile in rows[0][1]]
    sheet = Image.new(
        "RGB", (GAP + (TILE + GAP) * len(columns), HEADER + (TILE + HEADER + GAP) * len(rows) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (TILE + GAP), 2), name, fill="black")
    for row, (text, pictures) in enumerate(rows):
        top = HEADER + row * (TILE + HEADER + GAP)
        draw.text((GAP, top + TILE + 1), text, fill="black")
        for column, picture in enumerate(pictures):
            tile = Image.fromarray(picture.pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * (TILE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def choose(artifact: Artifact, groups: int = ROWS, keys: Sequence[str] = ()) -> list[Record]:
    """`groups` groups spread evenly over the artifact, or the groups with the given keys.

    Raises:
        ConfigError: an unknown key, no group to draw, or an empty artifact.
    """
    check_count("groups", groups)
    check_list("keys", keys)
    if len(artifact) == 0:
        raise ConfigError(f"{artifact.location.url}: expected at least one group to draw, found none")
    try:
        indices = [artifact.index_of(key) for key in keys]
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    if not indices:
        # Rounded, not cut off as where a source chooses what it hashes: both choices are in what has been written.
        spread = np.linspace(0, len(artifact) - 1, min(groups, len(artifact))).round().astype(int)
        indices = sorted(set(spread.tolist()))
    return list(artifact.records(indices))


def caption(record: Record) -> str:
    """Key, number of members and label of a group."""
    label = "" if record.label is None else f"  label {record.label}"
    return f"{record.key}  N = {record.count}{label}"


def tiles(record: Record) -> list[Tile]:
    """The pictures of a group, from left to right."""
    found: list[Tile] = []
    clean, members = record.clean, record.members
    if clean is not None:
        found.append(Tile("clean", rgb(clean)))
    if members is not None:
        shown = [members[min(i, len(members) - 1)] for i in range(SHOWN_MEMBERS)]
        found += [Tile(f"member {i}", rgb(member)) for i, member in enumerate(shown)]
    found.append(Tile("mean", rgb((record.mean * 255).round().astype(np.uint8))))
    reference = members[0] if members is not None else clean
    if reference is not None:
        difference = record.mean - reference.astype(np.float32) / 255
        largest = max(float(np.abs(difference).max()), 1e-6)
        amplified = (127.5 + 127.5 * difference / largest).round().astype(np.uint8)
        name = f"mean - {'member 0' if members is not None else 'clean'}"
        found.append(Tile(name, rgb(amplified), f"× {0.5 / largest:.3g}, around grey"))
    variance = record.variance.mean(axis=0)
    found.append(Tile("variance", heat(variance), f"black 0, white {float(variance.max()):.2g}"))
    return found
