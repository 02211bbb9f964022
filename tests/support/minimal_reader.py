"""A whole reader of datamerge artifacts, from FORMAT.md alone: numpy, json, tarfile and zarr, no datamerge.

`read(folder)` yields one dict per record: key, count, label, samples, mean, mean_square, variance, and the optional
arrays that the artifact has. It does not verify checksums.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr


def read(folder: Path) -> Iterator[dict[str, Any]]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    if manifest["schema_version"] != 1 or not manifest["complete"]:
        raise ValueError(f"{folder}: not a finished artifact of schema version 1")
    layout = manifest["layout"]
    rows = zarr_rows if layout["format"] == "zarr" else tar_rows
    for entry in manifest["shards"]:
        commit = json.loads((folder / f"commits/{entry['shard']:05d}.json").read_text(encoding="utf-8"))
        for record, arrays in zip(commit["records"], rows(folder, layout, commit), strict=True):
            yield decode(layout["encoding"], record, arrays)


def zarr_rows(folder: Path, layout: dict[str, Any], commit: dict[str, Any]) -> Iterator[dict[str, Any]]:
    group = zarr.open_group(folder / "groups.zarr", mode="r")
    first = commit["shard"] * layout["groups_per_shard"]
    for row in range(first, first + len(commit["records"])):
        yield {spec["name"]: np.asarray(group[spec["name"]][row]) for spec in layout["arrays"]}  # type: ignore[index]


def tar_rows(folder: Path, layout: dict[str, Any], commit: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with tarfile.open(folder / f"shards/{commit['shard']:05d}.tar") as tar:
        for record in commit["records"]:
            arrays = {}
            for spec in layout["arrays"]:
                member = tar.extractfile(f"{record['key']}.{spec['name']}.npy")
                if member is None:
                    raise ValueError(f"{record['key']}: no {spec['name']}")
                count, data = int(np.prod(spec["shape"])), member.read()  # the array is the end of the .npy file
                start = len(data) - count * np.dtype(spec["dtype"]).itemsize
                values = np.frombuffer(data, np.dtype(spec["dtype"]).newbyteorder("<"), count, start)
                arrays[spec["name"]] = values.reshape(spec["shape"])
            yield arrays


def decode(encoding: str, record: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    found = {name: record[name] for name in ("key", "count", "label", "samples")}
    if encoding == "uint8_moments":
        scale = 255.0 * record["count"]
        total, scatter = arrays.pop("sum").astype(np.float64), arrays.pop("scatter").astype(np.float64)
        found["mean"], found["variance"] = total / scale, scatter / scale**2
        found["mean_square"] = (scatter + total**2) / scale**2
    else:
        found["mean"], found["mean_square"] = (
            arrays.pop(name).astype(np.float64) for name in ("mean", "mean_square")
        )
        found["variance"] = np.maximum(found["mean_square"] - found["mean"] ** 2, 0.0)
    if "members" in arrays:
        arrays["members"] = arrays["members"][: record["count"]]
    return {**found, **arrays}
