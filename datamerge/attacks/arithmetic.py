"""Reproducible arithmetic: float32 without TF32, and kernels that add in a fixed order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

T = TypeVar("T")

# cuBLAS is deterministic with workspaces of a fixed number and size; torch takes these on recent GPUs anyway. torch
# reads the variable once, at the first matrix product on a GPU, so it is set on import.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Models with an operation that has no deterministic kernel, such as the backward pass of max-pooling.
_NONDETERMINISTIC: WeakSet[nn.Module] = WeakSet()


@contextmanager
def arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Inside, convolutions are deterministic, and products are float32, or TF32 on a GPU if `tf32` is True.

    By default PyTorch allows TF32 in convolutions and may choose their kernels by timing. It reads these settings
    when a kernel starts, so the backward pass belongs inside too.
    """
    before = torch.get_float32_matmul_precision()
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, benchmark_limit=None, deterministic=True, allow_tf32=tf32
    ):
        torch.set_float32_matmul_precision("high" if tf32 and device.type == "cuda" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def fixed_order(device: torch.device) -> Iterator[None]:
    """Inside, a GPU runs only deterministic kernels, including those of attention and cuBLAS.

    Other GPU kernels add in the order in which threads finish. On a CPU nothing changes.

    Raises:
        RuntimeError: from an operation without a deterministic kernel, when it is called.
    """
    if device.type != "cuda":
        yield
        return
    fills: Any = torch.utils.deterministic
    strict, warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled = fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # filling memory that is overwritten next costs time
    try:
        yield
    finally:
        fills.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def in_fixed_order(model: nn.Module, device: torch.device, passes: Callable[[], T]) -> T:
    """Run passes of a model in `fixed_order`, or without it if an operation has no deterministic kernel.

    Such a model is remembered, whatever modules wrap it, so that the attempt is not repeated for every batch.
    """
    inside = _inside(model)
    if inside not in _NONDETERMINISTIC:
        try:
            with fixed_order(device):
                return passes()
        except RuntimeError as error:
            if device.type != "cuda" or "determin" not in str(error).lower():
                raise
            _NONDETERMINISTIC.add(inside)
    return passes()


def _inside(model: nn.Module) -> nn.Module:
    """The innermost module of wrappers that have one child each."""
    while len(children := list(model.children())) == 1:
        model = children[0]
    return model


def quotient(numbers: Tensor, by: float) -> Tensor:
    """Divide a tensor by a number, rounding once in its dtype, with the same result on every device.

    On a GPU torch replaces the division by a Python number with a multiplication by its inverse, which is off in the
    last place for half of the 256 levels.
    """
    return numbers / torch.full((), by, dtype=numbers.dtype, device=numbers.device)
