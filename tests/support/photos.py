"""Photos of odd sizes embedded by our own pipeline, and a malicious pickle for readers of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from datamerge.encoders import Encoder
from datamerge.sources import decode


def photo(height: int, width: int) -> Image.Image:
    """Smooth colours under noise."""
    rng = np.random.default_rng([height, width])
    coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3)).astype(np.uint8)).resize((width, height), 3)
    noise = rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray((np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8))


PHOTOS = [photo(375, 500), photo(331, 227)]


def embedded(encoder: Encoder) -> Tensor:
    """Embeddings of the photos, of length 1."""
    pixels = torch.stack([torch.from_numpy(decode(one, encoder.preprocessing)) for one in PHOTOS])
    with torch.no_grad():
        return nn.functional.normalize(encoder(pixels.float() / 255), dim=-1)


class Exploit:
    """Runs code when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)
