"""Tuned encoders, photos, and the code in the card of an export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, save_encoder
from datamerge.sources import decode


def tuned(spec: str, folder: Path) -> Encoder:
    """The encoder of a spec with changed weights, as after a training run."""
    encoder = load_encoder(spec)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_encoder(encoder, folder / "encoder.safetensors")
    return load_encoder(f"{spec}@{folder / 'encoder.safetensors'}")


def odd_photos() -> list[Image.Image]:
    rng = np.random.default_rng(7)
    sizes = ((61, 83), (97, 50), (200, 33), (181, 243))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in sizes]


def embed(encoder: Encoder, photos: list[Image.Image]) -> Tensor:
    pixels = np.stack([decode(photo, encoder.preprocessing) for photo in photos])
    with torch.no_grad():
        embeddings: Tensor = encoder(torch.from_numpy(pixels).float() / 255)
    return embeddings


def run_card(
    folder: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, expected: Tensor, tolerance: float = 1e-4
) -> None:
    """Run the model card's code on a photo and compare its embeddings."""
    photo.save(folder / "photo.png")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code.replace("photo.jpg", "photo.png"), names)
    torch.testing.assert_close(names["embeddings"], expected, rtol=tolerance, atol=tolerance)
