"""Artifacts to combine, and a check of their union."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from storage_schemas import (
    ArraySpec,
    Artifact,
    ArtifactWriter,
    ExactMoments,
    Layout,
    Location,
    Record,
    Reject,
    open_artifact,
)
from storage_schemas.operations.combine import plan_combination
from storage_schemas.schema.factors import factors
from storage_schemas.schema.provenance import leaves, tree
from storage_schemas.schema.record import encode_exact, moment_specs

SHAPE, WIDTH = (1, 3, 4), 5
ROUND: dict[str, Any] = {
    "source": {"url": "photos/", "fingerprint": "f00", "samples": 9, "class_names": []},
    "grouping": {"kind": "adversarial", "members": 4},
    "preprocessing": {"shape": [1, 3, 4]},
    "encoder": {"spec": "clip", "sha256": "e0"},
    "attack": {"kind": "pgd", "epsilon": "2/255", "random_start": True},
    "seed": 0,
}
LABELS: dict[str, Any] = {
    "source": {"url": "mnist/", "fingerprint": "f00", "samples": 9, "class_names": ["a", "b"]},
    "grouping": {"kind": "label", "members": None},
    "seed": 0,
}


def members_of(seed: Sequence[int], count: int, clean: Any = None) -> Any:
    rng = np.random.default_rng(list(seed))
    if clean is None:
        return rng.integers(0, 256, (count, *SHAPE)).astype(np.uint8)
    return np.clip(clean + rng.integers(-2, 3, (count, *SHAPE)), 0, 255).astype(np.uint8)


def clean_of(key: str) -> Any:
    return members_of([1, int(key[1:])], 1)[0]


def make(
    folder: Path,
    groups: Mapping[str, Any],
    provenance: Mapping[str, Any] = ROUND,
    changes: Mapping[str, Any] | None = None,
    *,
    format: str = "zarr",
    encoding: str = "uint8_moments",
    extras: Sequence[str] = ("target", "members", "clean"),
    rejects: Sequence[Reject] = (),
    overrides: Callable[[Record], dict[str, Any]] = lambda record: {},
    files: Mapping[str, bytes] | None = None,
) -> Artifact:
    """Write an artifact of `groups` (key → members), two a shard; `changes` are dotted provenance leaves."""
    largest = max(len(members) for members in groups.values())
    shapes = {"target": (WIDTH,), "members": (largest, *SHAPE), "clean": SHAPE, "factors": (1, *SHAPE)}
    dtypes = {"target": "f4", "members": "u1", "clean": "u1", "factors": "i1"}
    arrays = moment_specs(encoding, SHAPE, largest, 255)  # type: ignore[arg-type]
    arrays += [ArraySpec.of(name, np.dtype(dtypes[name]), shapes[name]) for name in extras]
    layout = Layout.model_validate(
        {
            "format": format,
            "encoding": encoding,
            "arrays": tuple(arrays),
            "groups": len(groups) + len(rejects),
            "groups_per_shard": 2,
        }
    )
    flat = leaves(provenance) | dict(changes or {})
    writer = ArtifactWriter(Location(folder), layout, tree({k: v for k, v in flat.items() if v is not None}))
    writer.begin(files or {})
    records = []
    for key, members in groups.items():
        padded = np.concatenate([members, np.zeros((largest - len(members), *SHAPE), np.uint8)])
        record = Record(
            key=key,
            count=len(members),
            encoding=layout.encoding,
            arrays={
                **encode_exact(ExactMoments.of(members), layout),
                "target": np.random.default_rng([2, int(key[1:])]).normal(size=WIDTH).astype(np.float32),
                "members": padded,
                "clean": clean_of(key),
                "factors": factors(members, 1, "sketch", np.random.default_rng(0)).astype(np.int8),
            },
            label=int(key[1:]) % 2,
            samples=(f"{key}.png",),
            info={"attack_loss": float(members.mean())},
        )
        record = Record(**{**{name: getattr(record, name) for name in Record.__slots__}, **overrides(record)})
        records.append(record)
    for shard in range(layout.shards):
        writer.commit(shard, records[2 * shard : 2 * shard + 2], rejects if shard == 0 else ())
    writer.finish()
    return open_artifact(folder)


def attacked(keys: Sequence[str], seed: int, count: int = 4) -> dict[str, Any]:
    return {key: members_of([seed, int(key[1:])], count, clean_of(key).astype(int)) for key in keys}


def combine(folder: Path, *inputs: Artifact, allow: Sequence[str] = ()) -> Artifact:
    manifest = plan_combination(inputs, allow).write(Location(folder))
    assert manifest.complete
    return open_artifact(folder)


def check(record: Record, members: Any) -> None:
    """Check that a record equals what one merge of all these members would have stored."""
    moments = ExactMoments.of(members)
    assert record.count == len(members)
    np.testing.assert_array_equal(record.arrays["sum"], moments.sum)
    np.testing.assert_array_equal(record.arrays["scatter"], moments.scatter)
    if "members" in record.arrays:
        np.testing.assert_array_equal(record.members, members)
