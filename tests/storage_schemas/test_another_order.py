"""Artifacts with the same groups in different orders: each sidecar is read once."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import Artifact, ArtifactWriter, Layout, Location, Record, open_artifact
from storage_schemas.operations.combine import plan_combination
from storage_schemas.operations.diff import diff
from storage_schemas.sidecars import CACHED_COMMITS

GROUPS = 3 * (CACHED_COMMITS + 6)  # in more shards than the cache of sidecars holds


@pytest.fixture
def both(
    tmp_path: Path, make_layout: Callable[..., Layout], make_record: Callable[..., Record], provenance: dict[str, Any]
) -> list[Artifact]:
    """Two attacks on the same groups: one artifact in the order of their numbers, the other shuffled."""
    layout = make_layout("webdataset", groups=GROUPS, extras=())
    order = list(range(GROUPS))
    random.Random(0).shuffle(order)
    found = []
    for seed, numbers in ((1, range(GROUPS)), (2, order)):
        attacked = {**provenance, "seed": seed, "attack": {"kind": "pgd"}}
        writer = ArtifactWriter(Location(tmp_path / str(seed)), layout, attacked)
        writer.begin({})
        for shard in range(layout.shards):
            writer.commit(shard, [make_record(number, layout) for number in numbers[3 * shard : 3 * shard + 3]], [])
        writer.finish()
        found.append(open_artifact(tmp_path / str(seed)))
    return found


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Number of reads of each sidecar."""
    counts: Counter[str] = Counter()
    original = Location.read

    def counted(self: Location, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        if relative.startswith("commits/"):
            counts[f"{self.url}/{relative}"] += 1
        return original(self, relative, start, end)

    monkeypatch.setattr(Location, "read", counted)
    return counts


def test_diff_reads_each_sidecar_once(both: list[Artifact], read: Counter[str]) -> None:
    found = diff(both[0], both[1])
    assert (found.equal, found.compared) == (True, GROUPS)
    assert set(read.values()) == {1}
    assert len(read) == 2 * GROUPS // 3


def test_combining_reads_each_sidecar_once(tmp_path: Path, both: list[Artifact], read: Counter[str]) -> None:
    plan_combination(both).write(Location(tmp_path / "c"))
    assert {path: count for path, count in read.items() if "/c/commits/" not in path and count > 1} == {}
    for record, one in zip(open_artifact(tmp_path / "c"), both[0], strict=True):
        other = both[1][one.key]
        assert (record.key, record.count) == (one.key, one.count + other.count)
        np.testing.assert_array_equal(record.arrays["sum"], np.add(one.arrays["sum"], other.arrays["sum"]))
        assert (record.samples, dict(record.info)) == (one.samples, dict(one.info))
