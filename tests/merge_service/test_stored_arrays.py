"""Stored arrays computed by torch equal NumPy's bit for bit, in a batch and in whole shards."""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from merge_service import MergeConfig
from merge_service.reading import decoders_of_a_gpu
from merge_service.stored_arrays import moment_arrays
from storage_schemas import (
    ArtifactWriter,
    ExactMoments,
    Layout,
    Record,
    encode_exact,
    moment_specs,
    stored_factors,
)
from tests.support.merging import merge_alone
from tests.support.on_device import SHAPE, assert_stored_arrays_are_numpys

ENCODER = "mlp:3x8x8-5"


# N²·255² fits 32 bits up to 181.
@pytest.mark.parametrize("number", [1, 2, 10, 181, 182, 200])
def test_moments_and_factors_equal_those_of_numpy(number: int) -> None:
    assert_stored_arrays_are_numpys("cpu", number, (1, 3) if number > 100 else (1, 2, 5))


def test_members_with_more_scatter_than_planned_are_refused() -> None:
    specs = tuple(moment_specs("uint8_moments", SHAPE, 40, 4))
    layout = Layout(format="zarr", encoding="uint8_moments", arrays=specs, groups=1, groups_per_shard=1)
    members = torch.zeros((1, 40, *SHAPE), dtype=torch.uint8)
    moment_arrays(members, layout)
    members[0, 20:] = 40
    with pytest.raises(OverflowError, match="scatter"):
        moment_arrays(members, layout)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(5) % 2)
    return tmp_path / "x.npz"


@pytest.mark.parametrize(
    "settings",
    [
        {"encoding": "float32"},
        {"factors": 1, "batch_size": 9},  # two groups at a time
        {"factors": 2, "factor_kind": "principal", "epsilon": "16/255"},
        {"attack": "apgd", "restarts": 2, "factors": 1},
        {"precision": "bfloat16", "objective": "cross_entropy"},
    ],
    ids=str,
)
def test_stored_arrays_follow_from_the_stored_members(photos: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    shared = {"encoder": ENCODER, "members": 4, "keep_members": True, "keep_clean": True, "groups_per_shard": 3}
    artifact = merge_alone(photos, tmp_path / "out", **shared, **settings)
    layout, kind = artifact.manifest.layout, settings.get("factor_kind", "sketch")
    assert len(artifact) == 5
    for record in artifact:
        assert record.members is not None
        expected = dict(encode_exact(ExactMoments.of(record.members), layout))
        if layout.array("factors"):
            expected["factors"] = stored_factors(record.members, layout, kind, 0, record.key)
        for name, array in expected.items():
            np.testing.assert_array_equal(record.arrays[name], array)


class Dim(nn.Module):
    """Squares of single pixels, so that no sample depends on its batch; not finite for bright images."""

    input_shape = (3, 8, 8)

    def forward(self, pixels: Tensor) -> Tensor:
        bright = (pixels.mean(dim=(1, 2, 3)) > 0.9).float().view(-1, 1)
        return pixels.flatten(1).square() / (1 - bright)


def test_a_group_without_a_finite_gradient_does_not_change_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other groups of its batch keep their random starts, and a batch of such groups alone is rejected."""
    module = types.ModuleType("dim_networks")
    module.__dict__["network"] = Dim
    monkeypatch.setitem(sys.modules, "dim_networks", module)
    images = np.random.default_rng(0).integers(0, 200, (6, 8, 8, 3), np.uint8)
    images[[1, 2, 5]] = 255
    np.savez(tmp_path / "x.npz", images=images)
    found = []
    for batch in (3, 6, 18):  # one group at a time, two, all
        artifact = merge_alone(
            tmp_path / "x.npz",
            tmp_path / str(batch),
            encoder="python:dim_networks:network",
            batch_size=batch,
            members=3,
            factors=1,
            keep_members=True,
            restarts=2,
        )
        (shard,) = artifact.manifest.shards
        assert (shard.groups, shard.rejected) == (3, 3)
        assert {reject.reason for reject in artifact.commit(0).rejects} == {"non-finite gradient"}
        found.append(
            {record.key: {name: array.tobytes() for name, array in record.arrays.items()} for record in artifact}
        )
    assert found[0] == found[1] == found[2]


def test_records_are_freed_one_by_one_while_a_shard_is_written(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a shard being written and one being attacked would take the memory of three."""
    alive: list[weakref.ref[Any]] = []
    alive_counts = []

    def commit(writer: ArtifactWriter, shard: int, records: Iterator[Record], rejects: Any) -> Any:
        def observed() -> Iterator[Record]:
            for record in records:
                alive.append(weakref.ref(record.arrays["sum"]))
                yield record
                del record
                gc.collect()
                alive_counts.append(sum(array() is not None for array in alive))

        return original(writer, shard, observed(), rejects)

    original = ArtifactWriter.commit
    monkeypatch.setattr(ArtifactWriter, "commit", commit)
    merge_alone(photos, tmp_path / "out", encoder=ENCODER, members=2, batch_size=2)
    assert len(alive_counts) == 5
    assert max(alive_counts) <= 2  # the writer still refers to the last one


@pytest.mark.parametrize(
    ("settings", "cpus", "gpus", "threads"),
    [
        ({}, 96, 8, 12),
        ({"num_gpus": 0.25}, 96, 8, 3),
        ({"num_gpus": 2.0}, 48, 8, 12),
        ({}, 128, 1, 16),  # more would not help
        ({}, 4, 8, 1),
        ({"threads": 2}, 4, 8, 2),
        ({"num_cpus": 5}, 96, 8, 5),
        ({}, 6, 0, 6),  # a node whose GPU Ray does not count
    ],
)
def test_a_gpus_worker_decodes_with_its_share_of_the_cpus(
    settings: dict[str, Any], cpus: float, gpus: float, threads: int
) -> None:
    config = MergeConfig.model_validate({"source": "x", "artifact": "y", "encoder": ENCODER, **settings})
    assert decoders_of_a_gpu(config, cpus, gpus) == threads
