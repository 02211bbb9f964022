"""A contact sheet: what the groups of an artifact look like.

One row a group, from left to right: clean (if kept), members (if kept), mean, amplified difference, variance.
The difference is mean − first member if members are kept, else mean − clean, around middle grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from storage_schemas.artifact import Artifact
from storage_schemas.errors import ConfigError
from storage_schemas.schema.record import Record

Pixels = npt.NDArray[np.uint8]

ROWS = 8
SHOWN_MEMBERS = 4
TILE = 112
GAP, HEADER = 4, 16
# Black-red-yellow-white, readable in grey and by colour-blind eyes.
_HEAT = np.array([[0, 0, 0], [150, 0, 0], [255, 120, 0], [255, 230, 80], [255, 255, 255]], np.float64)


def contact_sheet(artifact: Artifact, groups: int = ROWS, keys: Sequence[str] = ()) -> bytes:
    """A PNG of `groups` groups spread evenly over the artifact, or of the groups with the given keys.

    Raises:
        ConfigError: an unknown key, or an empty artifact.
    """
    if len(artifact) == 0:
        raise ConfigError(f"{artifact.location.url}: expected at least one group to draw, found none")
    try:
        indices = [artifact.index_of(key) for key in keys]
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
    if not indices:
        indices = sorted(set(np.linspace(0, len(artifact) - 1, min(groups, len(artifact))).round().astype(int)))
    rows = [_row(artifact[int(index)]) for index in indices]
    columns = [name for name, _ in rows[0][1]]
    sheet = Image.new(
        "RGB", (GAP + (TILE + GAP) * len(columns), HEADER + (TILE + HEADER + GAP) * len(rows) + GAP), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((GAP + column * (TILE + GAP), 2), name, fill="black")
    for row, (caption, tiles) in enumerate(rows):
        top = HEADER + row * (TILE + HEADER + GAP)
        draw.text((GAP, top + TILE + 1), caption, fill="black")
        for column, (_, pixels) in enumerate(tiles):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.NEAREST)
            sheet.paste(tile, (GAP + column * (TILE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _row(record: Record) -> tuple[str, list[tuple[str, Pixels]]]:
    """Caption and tiles of a group."""
    label = "" if record.label is None else f"  label {record.label}"
    return f"{record.key}  N = {record.count}{label}", _tiles(record)


def _tiles(record: Record) -> list[tuple[str, Pixels]]:
    tiles: list[tuple[str, Pixels]] = []
    clean, members = record.clean, record.members
    if clean is not None:
        tiles.append(("clean", rgb(clean)))
    if members is not None:
        shown = [members[min(i, len(members) - 1)] for i in range(SHOWN_MEMBERS)]
        tiles += [(f"member {i}", rgb(member)) for i, member in enumerate(shown)]
    tiles.append(("mean", rgb((record.mean * 255).round().astype(np.uint8))))
    reference = members[0] if members is not None else clean
    if reference is not None:
        difference = record.mean - reference.astype(np.float32) / 255
        largest = max(float(np.abs(difference).max()), 1e-6)
        amplified = (127.5 + 127.5 * difference / largest).round().astype(np.uint8)
        tiles.append((f"mean - {'member 0' if members is not None else 'clean'}", rgb(amplified)))
    tiles.append(("variance", heat(record.variance.mean(axis=0))))
    return tiles


def rgb(pixels: Pixels) -> Pixels:
    """uint8 [C, H, W] → [H, W, 3]."""
    if pixels.shape[0] not in (1, 3):
        pixels = pixels[:1]
    return np.ascontiguousarray(np.broadcast_to(pixels, (3, *pixels.shape[1:])).transpose(1, 2, 0))


def heat(values: npt.NDArray[np.floating]) -> Pixels:
    """Values [H, W] on a heat scale from 0 to their maximum."""
    scaled = values / max(float(values.max()), 1e-12) * (len(_HEAT) - 1)
    channels = [np.interp(scaled, np.arange(len(_HEAT)), _HEAT[:, c]) for c in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
