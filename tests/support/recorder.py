"""An encoder that records PyTorch's precision and determinism flags at each forward and backward pass."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor, nn

SPEC = "python:recording_networks:network"


class Note(NamedTuple):
    """Flags at one pass.

    Attributes:
        backward: whether it was a backward pass.
        deterministic: convolutions are deterministic, and their kernels are not chosen by timing.
        tf32: whether convolutions may use TF32.
        products: the value of torch.get_float32_matmul_precision().
        dtype: dtype of the outputs.
    """

    backward: bool
    deterministic: bool
    tf32: bool
    products: str
    dtype: torch.dtype


def note(backward: bool, dtype: torch.dtype) -> Note:
    """The current flags."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.enabled and cudnn.deterministic and not cudnn.benchmark
    return Note(backward, deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision(), dtype)


class _Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        Network.notes.append(note(False, values.dtype))
        return values.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        Network.notes.append(note(True, gradient.dtype))
        return gradient.clone()


class Network(nn.Module):
    """A linear network from 1×4×4 pixels to 6 outputs."""

    input_shape = (1, 4, 4)
    notes: ClassVar[list[Note]] = []  # shared by all instances

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)  # trained in float32, whatever the precision
        self.layer = nn.Linear(16, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = _Noted.apply(self.layer(self.first(pixels.flatten(1))))  # type: ignore[no-untyped-call]
        return outputs


@contextmanager
def recording() -> Iterator[list[Note]]:
    """Record the passes inside the block; the encoder `SPEC` can be loaded, and the flags outside are wrong."""
    module = types.ModuleType("recording_networks")
    module.__dict__["network"] = Network
    Network.notes = []
    precision = torch.get_float32_matmul_precision()
    with (
        pytest.MonkeyPatch.context() as patch,
        torch.backends.cudnn.flags(True, benchmark=True, benchmark_limit=None, deterministic=False, allow_tf32=True),
    ):
        patch.setitem(sys.modules, "recording_networks", module)
        torch.set_float32_matmul_precision("medium")
        try:
            around = note(False, torch.float32)
            yield Network.notes
            assert note(False, torch.float32) == around
        finally:
            torch.set_float32_matmul_precision(precision)
