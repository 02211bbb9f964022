"""Tiny artifacts in every format and encoding: 7 groups of up to 4 members, 3 a shard, pixels 3×4×5."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from datamerge.artifacts import convert
from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record, Reject, open_artifact
from storage_schemas.schema.moments import scatter_dtype, sum_dtype
from storage_schemas.schema.record import encode_exact

SHAPE, WIDTH, MEMBERS = (3, 4, 5), 6, 4
GROUPS, GROUPS_PER_SHARD = 7, 3
EXTRAS = ("target", "members", "clean")
PROVENANCE: dict[str, Any] = {"seed": 7, "source": {"url": "photos/", "fingerprint": "f00"}, "grouping": "label"}


def build_layout(
    format: str = "zarr",
    encoding: str = "uint8_moments",
    extras: Iterable[str] = EXTRAS,
    groups: int = GROUPS,
) -> Layout:
    if encoding == "float32":
        arrays = [ArraySpec.of(name, np.dtype("f4"), SHAPE) for name in ("mean", "mean_square")]
    else:
        arrays = [
            ArraySpec.of("sum", sum_dtype(MEMBERS), SHAPE),
            ArraySpec.of("scatter", scatter_dtype(MEMBERS, 255), SHAPE),
        ]
    shapes = {"target": (WIDTH,), "members": (MEMBERS, *SHAPE), "clean": SHAPE}
    dtypes = {"target": "f4", "members": "u1", "clean": "u1"}
    arrays += [ArraySpec.of(name, np.dtype(dtypes[name]), shapes[name]) for name in extras]
    return Layout.model_validate(
        {
            "format": format,
            "encoding": encoding,
            "arrays": tuple(arrays),
            "groups": groups,
            "groups_per_shard": GROUPS_PER_SHARD,
        }
    )


def build_record(number: int, layout: Layout) -> Record:
    """Record `number`: every third has no label, counts go from 2 to MEMBERS."""
    rng = np.random.default_rng([11, number])
    count = 2 + number % (MEMBERS - 1)
    members = rng.integers(0, 256, (MEMBERS, *SHAPE)).astype(np.uint8)
    arrays = {
        **encode_exact(ExactMoments.of(members[:count]), layout),
        "target": rng.normal(size=WIDTH).astype(np.float32),
        "members": members,
        "clean": members[0],
    }
    return Record(
        key=f"k{number}",
        count=count,
        encoding=layout.encoding,
        arrays={spec.name: arrays[spec.name] for spec in layout.arrays},
        label=None if number % 3 == 2 else number % 4,
        samples=(f"photos/{number}.png", "ünï.png"),
        info={"attack_loss": 0.5 + number, "attack_loss_start": 0.25},
    )


def build_shards(layout: Layout, rejected: Sequence[int] = ()) -> list[list[Record]]:
    """Records of every shard, without the rejected numbers."""
    shards = []
    for shard in range(layout.shards):
        first = shard * layout.groups_per_shard
        numbers = range(first, min(first + layout.groups_per_shard, layout.groups))
        shards.append([build_record(number, layout) for number in numbers if number not in rejected])
    return shards


def write(
    url: Any, layout: Layout, rejected: Sequence[int] = (), files: dict[str, bytes] | None = None
) -> list[Record]:
    """Write a whole artifact and return its records."""
    writer = ArtifactWriter(Location(url), layout, PROVENANCE)
    writer.begin(files or {})
    shards = build_shards(layout, rejected)
    for shard, records in enumerate(shards):
        first = shard * layout.groups_per_shard
        rejects = [
            Reject(key=f"k{number}", sample=f"photos/{number}.png", reason="not an image")
            for number in rejected
            if first <= number < first + layout.groups_per_shard
        ]
        writer.commit(shard, records, rejects)
    writer.finish()
    return [record for records in shards for record in records]


def same_groups(artifact: str) -> str:
    """Convert an artifact to the other format, beside it; return the copy's path."""
    target, format = f"{artifact}-converted", open_artifact(artifact).manifest.layout.format
    convert(artifact, target, format="webdataset" if format == "zarr" else "zarr")
    return target


def assert_same(found: Record, expected: Record) -> None:
    """Check that two records are equal in every stored bit and every derived quantity."""
    facts = ("key", "count", "encoding", "label", "samples", "info")
    assert [getattr(found, name) for name in facts] == [getattr(expected, name) for name in facts]
    assert list(found.arrays) == list(expected.arrays)
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    for name in ("mean", "mean_square", "variance", "target", "members", "clean"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
