"""CIFAR-10 for the arms: an encoder trained on all training images, and a different test set for each seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamerge.sources import decode, open_source
from experiments.arms import Prepared
from experiments.cifar10.encoder import SHAPE, SPEC, pretrain
from storage_schemas.schema.preprocessing import Preprocessing

TEST_IMAGES = 500


def prepare(data: Path, work: Path) -> Prepared:
    """Train the encoder unless that is done."""
    weights, head = work / "encoder.safetensors", work / "head.safetensors"
    train = data / "cifar10" / "train.parquet"
    if not head.exists():
        work.mkdir(parents=True, exist_ok=True)
        pretrain(train, weights, head, seed=0)
    return Prepared(str(train), lambda seed: _test(data, work, seed), f"{SPEC}@{weights}", str(head))


def _test(data: Path, work: Path, seed: int) -> str:
    """Write the test images of a seed; seeds below 20 have disjoint images."""
    target = work / f"test-{seed}.npz"
    if not target.exists():
        listed = open_source(str(data / "cifar10" / "test.parquet"))
        first = seed * TEST_IMAGES
        samples = listed.samples[first : first + TEST_IMAGES]
        pixels = np.stack(
            [decode(listed.reader.read(sample), Preprocessing(shape=SHAPE)).transpose(1, 2, 0) for sample in samples]
        )
        np.savez(target, images=pixels, labels=np.array([sample.label for sample in samples]))
    return str(target)
