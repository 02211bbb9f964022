"""Encoders of a merge outside the attack, without a cluster: float32 arithmetic and out-of-memory errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamerge.encoders import Encoder
from merge_service import MergeConfig
from merge_service.merge import prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import ArtifactWriter, DatamergeError, Location
from tests.support.recorder import SPEC, recording
from tests.support.refusals import refused


def _worker(tmp_path: Path, settings: dict[str, Any]) -> tuple[ShardWorker, Any]:
    """A worker in this process, and the plan's first shard."""
    images = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 1), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(6) % 2)
    shared = {"source": str(tmp_path / "x.npz"), "artifact": str(tmp_path / "a"), "encoder": SPEC, "device": "cpu"}
    prepared = prepare(MergeConfig.model_validate({**shared, **settings}))
    writer = ArtifactWriter(Location(str(tmp_path / "a")), prepared.plan.layout, prepared.plan.provenance)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    worker.prepare()
    return worker, prepared.plan.task(0)


GROUPINGS: list[dict[str, Any]] = [
    {"grouping": "adversarial", "members": 2, "steps": 0, "precision": "tf32"},
    {"grouping": "adversarial", "members": 2, "steps": 0, "precision": "bfloat16"},
    {"grouping": "label", "targets": "embedding"},
]


@pytest.mark.parametrize("settings", GROUPINGS, ids=str)
def test_targets_are_computed_in_float32_at_any_attack_precision(tmp_path: Path, settings: dict[str, Any]) -> None:
    with recording() as notes:
        worker, task = _worker(tmp_path, settings)
        notes.clear()
        worker.run(task)
        assert notes
        assert all(found.deterministic and found.products == "highest" and not found.tf32 for found in notes)
        assert {found.dtype for found in notes} == {torch.float32}


ERRORS = [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"grouping": "label", "targets": "embedding", "batch_size": 4}, ["4 images", "`batch_size`"]),
        (
            {"grouping": "adversarial", "members": 3, "steps": 1, "batch_size": 6},
            ["6 images", "3 members", "`batch_size`", "`members`", '`precision="bfloat16"`'],
        ),
    ],
    ids=["embeddings", "attack"],
)
def test_out_of_memory_names_the_settings_to_lower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], names: list[str], error: Exception
) -> None:
    def exhausted(*arguments: Any) -> None:
        raise error

    with recording():
        worker, task = _worker(tmp_path, settings)
        monkeypatch.setattr(Encoder, "forward", exhausted)
        with refused(DatamergeError, "batch_size", *names):
            worker.run(task)


def test_other_errors_of_an_encoder_are_raised_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("shapes do not match")

    with recording():
        worker, task = _worker(tmp_path, {"grouping": "adversarial", "members": 2, "steps": 1})
        monkeypatch.setattr(Encoder, "forward", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            worker.run(task)
