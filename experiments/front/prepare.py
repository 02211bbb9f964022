"""Digits and photos for the front, with separate images for choosing learning rates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from datamerge.sources import decode, open_source
from experiments.arms import Prepared
from experiments.digits.prepare import prepare as demo_digits
from experiments.front.run import TUNING_SEED
from experiments.photos.prepare import part
from experiments.photos.prepare import prepare as three_hundred_photos
from storage_schemas.schema.preprocessing import Preprocessing

TEST_DIGITS = 500
TRAIN_PHOTOS, TUNING_PHOTOS, TEST_PHOTOS = 700, 100, 150


def digits(data: Path, work: Path) -> Prepared:
    """The demo's encoder and training digits, with 500 different MNIST test images for each seed."""
    demo = demo_digits(data, work)

    def test(seed: int) -> str:
        if seed == TUNING_SEED:
            return demo.test(seed)
        target = work / f"test-{seed}.npz"
        if not target.exists():
            listed = open_source(str(data / "mnist" / "test.parquet"))
            first = seed * TEST_DIGITS
            samples = listed.samples[first : first + TEST_DIGITS]
            images = [decode(listed.reader.read(one), Preprocessing(shape=(1, 28, 28)))[0] for one in samples]
            np.savez(target, images=np.stack(images), labels=np.array([one.label for one in samples]))
        return str(target)

    return Prepared(demo.train, test, demo.encoder, demo.head)


def photos(data: Path, work: Path) -> Prepared:
    """700 training photos, 100 for choosing rates, and 150 test photos, the same for every seed."""
    small = three_hundred_photos(data, work)
    folder = data / "nips17"

    def test(seed: int) -> str:
        if seed == TUNING_SEED:
            return part(folder, work / "photos-tuning", TRAIN_PHOTOS, TUNING_PHOTOS)
        return part(folder, work / "photos-test", TRAIN_PHOTOS + TUNING_PHOTOS, TEST_PHOTOS)

    return Prepared(part(folder, work / "photos-train", 0, TRAIN_PHOTOS), test, small.encoder, small.head)
