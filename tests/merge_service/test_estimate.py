"""Estimated FLOPs against counts: of an encoder by hand, of an attack while it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from datamerge.encoders import Encoder, load_encoder
from merge_service import MergeConfig
from merge_service.estimate import Passes, count_passes, group_flops
from merge_service.merge import prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import ArtifactWriter, Location


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products, backward passes included; torch's own counter refuses `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            left, right = args[-2:]
            self.flops += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def frozen(spec: str) -> Encoder:
    return load_encoder(spec).eval().requires_grad_(False)


def test_flops_of_attention_are_counted() -> None:
    """ViT-S-32-alt: 12 blocks of width 384 on 49 patches and a class token; an embedding of 256 values."""
    tokens, width = 50, 384
    block = 2 * tokens * 12 * width**2 + 4 * tokens**2 * width
    forward = 12 * block + 2 * 49 * 3 * 32**2 * width + 2 * width * 256
    found = count_passes(frozen("open_clip:ViT-S-32-alt"), (3, 224, 224))
    assert found.forward == forward
    # A product of two activations has two gradients, that of an activation and a frozen weight has one.
    assert found.gradient == 2 * forward + 12 * 4 * tokens**2 * width


@pytest.mark.parametrize("method", ["pgd", "apgd"])
def test_flops_of_a_group_are_those_of_its_attack(method: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "photos.npz", images=images)
    settings = {"attack": method, "members": 3, "steps": 4, "restarts": 2, "device": "cpu"}
    places = {"source": str(tmp_path / "photos.npz"), "artifact": str(tmp_path / "adv")}
    config = MergeConfig.model_validate({**places, "encoder": "mlp:3x8x8-16-4", "groups_per_shard": 2, **settings})
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    worker.prepare()
    counted = Products()
    with counted:
        worker.run(prepared.plan.task(0))
    assert worker.model is not None
    assert 2 * group_flops(config, count_passes(worker.model, (3, 8, 8))) == counted.flops


def test_flops_of_a_group_equal_a_count_by_hand() -> None:
    config = MergeConfig(source="photos", artifact="adv", encoder="mlp:3x8x8-16-4", members=10, steps=10)
    assert group_flops(config, Passes(forward=1.0, gradient=2.0)) == 1 + 10 * (2 * 10 + 1)
