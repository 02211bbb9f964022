"""Writes the golden artifacts of the current schema version: `python tests/golden/make.py tests/golden/v1`.

Run it once per schema version and commit the result, which every later release has to read. `values.json` has the
contents, computed here in exact fractions from the members and not by the code that reads artifacts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from storage_schemas import ArtifactWriter, ExactMoments, Layout, Location, Record, Reject
from storage_schemas.schema.record import encode_exact

SHAPE, WIDTH = (3, 2, 2), 4
COUNTS = {"cat-0": 2, "cat-1": 3, "dog_0": 1, "dog_2": 3}  # dog_1 is rejected; three groups a shard
PROVENANCE = {"seed": 7, "source": {"url": "pets/", "samples": 5}}
REJECT = Reject(key="dog_1", sample="dogs/ünï 1.png", reason="not an image")
HEAD = save({"weight": np.arange(8, dtype=np.float32).reshape(2, WIDTH) / 8}, metadata={"names": '["cat", "dog"]'})
OPTIONAL = {"target": ("float32", [WIDTH]), "members": ("uint8", [3, *SHAPE]), "clean": ("uint8", [*SHAPE])}


def members_of(key: str) -> npt.NDArray[np.uint8]:
    """Bright and dark pixels, a constant one, and perturbations of ± 2 levels, as in adversarial groups."""
    group = list(COUNTS).index(key)
    grid = np.arange(3 * 12).reshape(3, *SHAPE)
    values = (37 * group + 11 * (grid % 12) + (grid * (5 + group)) % 5) % 254
    values[:, 0, 0, 0] = 255
    return values.astype(np.uint8)[: COUNTS[key]]


def target_of(key: str) -> npt.NDArray[np.float32]:
    return ((np.arange(WIDTH) - len(key)) / 16).astype(np.float32)


def values() -> dict[str, Any]:
    """Every group's content as JSON: integers, and the float64 nearest to each exact moment."""
    groups = {}
    for key, count in COUNTS.items():
        columns = members_of(key).reshape(count, -1).T.tolist()
        mean = [Fraction(sum(column), 255 * count) for column in columns]
        mean_square = [Fraction(sum(x * x for x in column), 255**2 * count) for column in columns]
        groups[key] = {
            "count": count,
            "label": int(key.startswith("dog")),
            "samples": [f"{key}/{index}.png" for index in range(count)],
            "members": members_of(key).tolist(),
            "target": target_of(key).tolist(),
            "mean": [float(m) for m in mean],
            "mean_square": [float(s) for s in mean_square],
            "variance": [float(s - m * m) for m, s in zip(mean, mean_square, strict=True)],
        }
    return {"shape": list(SHAPE), "groups": groups}


def layouts() -> Iterator[tuple[str, Layout]]:
    moments = {
        "uint8_moments": {"sum": "uint16", "scatter": "uint32"},
        "float32": {"mean": "float32", "mean_square": "float32"},
    }
    for format in ("zarr", "webdataset"):
        for encoding, dtypes in moments.items():
            for kind in ("full", "bare"):
                arrays = [{"name": name, "dtype": dtype, "shape": SHAPE} for name, dtype in dtypes.items()]
                for name, (dtype, shape) in OPTIONAL.items() if kind == "full" else ():
                    arrays.append({"name": name, "dtype": dtype, "shape": tuple(shape)})
                document = {"format": format, "encoding": encoding, "arrays": tuple(arrays)}
                yield (
                    f"{format}-{encoding}-{kind}",
                    Layout.model_validate({**document, "groups": 5, "groups_per_shard": 3}),
                )


def record_of(key: str, layout: Layout) -> Record:
    members = members_of(key)
    padded = np.zeros((3, *SHAPE), np.uint8)
    padded[: len(members)] = members
    arrays = {**encode_exact(ExactMoments.of(members), layout), "target": target_of(key)}
    arrays |= {"members": padded, "clean": members[0]}
    return Record(
        key=key,
        count=len(members),
        encoding=layout.encoding,
        arrays={spec.name: arrays[spec.name] for spec in layout.arrays},
        label=int(key.startswith("dog")) if layout.array("members") else None,
        samples=tuple(f"{key}/{index}.png" for index in range(len(members))),
        info={"attack_loss": 0.5 * len(members)},
    )


def write_all(folder: Path) -> None:
    for name, layout in layouts():
        writer = ArtifactWriter(
            Location(folder / name), layout, {"seed": 7, "source": {"url": "pets/", "samples": 5}}
        )
        writer.begin({"head.safetensors": HEAD} if layout.array("members") else {})
        keys = list(COUNTS)
        writer.commit(0, [record_of(key, layout) for key in keys[:3]], [])
        writer.commit(1, [record_of(key, layout) for key in keys[3:]], [REJECT])
        writer.finish()
    (folder / "values.json").write_text(json.dumps(values()) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if target.exists():
        sys.exit(f"{target} exists; golden artifacts are written once and kept")
    write_all(target)
