"""Export single groups to common file formats: all arrays as `.npz`, or pictures as `.png`."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from storage_schemas.access.location import Location
from storage_schemas.artifact import Artifact
from storage_schemas.display import heat, rgb
from storage_schemas.errors import ConfigError
from storage_schemas.schema.arguments import check_choice, check_list
from storage_schemas.schema.record import Array, Record

Kind = Literal["npz", "png"]


def export(artifact: Artifact, keys: Sequence[str], target: Location, kind: Kind) -> list[str]:
    """Write groups to a folder and return the names of the files.

    Args:
        artifact: that holds the groups.
        keys: of the groups.
        target: the folder.
        kind: `npz` or `png`.

    Raises:
        ConfigError: the artifact does not have a key, the kind is unknown, or a file exists with other contents;
            nothing is written then.
    """
    check_list("keys", keys)
    check_choice("kind", kind, Kind)
    try:
        records = [artifact[artifact.index_of(key)] for key in dict.fromkeys(keys)]
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}; `datamerge inspect` and commits/*.json show the keys") from None
    files = {
        name: data for record in records for name, data in (npz_file if kind == "npz" else png_files)(record).items()
    }
    for name, data in files.items():
        if target.exists(name) and target.read(name) != data:
            raise ConfigError(f"{target.url}/{name}: a file with other contents is there; choose another folder")
    for name, data in files.items():
        target.write(name, data)
    return list(files)


def npz_file(record: Record) -> dict[str, bytes]:
    """`KEY.npz`: the stored arrays; mean, mean_square and variance in [0, 1]; count, label (−1 for none), samples."""
    arrays: dict[str, Any] = {
        **record.arrays,
        "mean": record.mean,
        "mean_square": record.mean_square,
        "variance": record.variance,
        "count": np.asarray(record.count, np.int64),
        "label": np.asarray(-1 if record.label is None else record.label, np.int64),
        "samples": np.array(record.samples, dtype=np.str_),
    }
    if record.members is not None:
        arrays["members"] = record.members  # without the padding of a smaller group
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return {f"{record.key}.npz": buffer.getvalue()}


def png_files(record: Record) -> dict[str, bytes]:
    """`KEY.mean.png` (rounded to 8 bits), `KEY.variance.png` (heat map, maximum white), and unchanged `KEY.clean.png`
    and `KEY.member-00.png` …, where the artifact keeps them."""
    pictures = {
        "mean": rgb((record.mean * 255).round().astype(np.uint8)),
        "variance": heat(record.variance.mean(axis=0)),
    }
    if record.clean is not None:
        pictures["clean"] = rgb(record.clean)
    for number, member in enumerate(() if record.members is None else record.members):
        pictures[f"member-{number:02d}"] = rgb(member)
    return {f"{record.key}.{name}.png": _png(pixels) for name, pixels in pictures.items()}


def _png(pixels: Array) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
