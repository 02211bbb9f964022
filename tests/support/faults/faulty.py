"""An encoder that fails on demand; it is on the path of every process of the test cluster.

Files in the folder DATAMERGE_FAULTS switch faults on. Faults never change results.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import ray
import torch
from torch import Tensor, nn

from storage_schemas.access import retries

# The store's faults end at once, so retries need not wait here; delays are tested without a cluster.
retries.FIRST_DELAY = 0.01

# Grey levels of the first pixel that mark an image.
NAN_LEVEL, POISON_LEVEL = 255, 249


def faults() -> Path:
    return Path(os.environ["DATAMERGE_FAULTS"])


class FaultyEncoder(nn.Sequential):
    """A small network that is slow, fails on one image in one of two ways, and is never finite for another."""

    input_shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, pixels: Tensor) -> Tensor:
        first = (pixels.detach()[:, 0, 0, 0] * 255).round()
        if (faults() / "slow").exists():
            (faults() / "busy" / str(os.getpid())).touch()
            time.sleep(0.1)
        marked = bool(((first - POISON_LEVEL).abs() <= 1).any())
        if marked and (faults() / "poison").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        if marked and (faults() / "lost").exists():
            (faults() / "lost").unlink()
            raise ray.exceptions.ObjectLostError("00" * 28, None, "")
        outputs: Tensor = super().forward(pixels)  # type: ignore[no-untyped-call]
        nan = first == NAN_LEVEL
        return outputs * torch.where(nan, float("nan"), 1.0)[:, None]


def encoder() -> FaultyEncoder:
    return FaultyEncoder()
