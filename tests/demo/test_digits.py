"""The demo's encoder is a function of its seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from datamerge.demo.digits import pretrain


def test_the_encoder_depends_on_the_seed_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in range(10):
        (tmp_path / "train" / str(label)).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (28, 28), np.uint8)).save(tmp_path / "train" / str(label) / "0.png")
    written = []
    for drawn_before, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(drawn_before)
        pretrain(tmp_path / "train", tmp_path / "encoder.safetensors", tmp_path / "head.safetensors", seed)
        written.append([(tmp_path / f"{name}.safetensors").read_bytes() for name in ("encoder", "head")])
    assert written[0] == written[1]
    assert written[1] != written[2]
