"""What float32 means on a device, and in which order its kernels add."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

T = TypeVar("T")

# cuBLAS adds in one order with workspaces of a fixed number and size, these being what torch takes on recent GPUs
# anyway. torch looks once, at the process's first matrix product on a GPU, so it is set before there can be one.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Models that run operations for which torch has no kernel that adds in one order, such as max-pooling's backward.
_IN_ANY_ORDER: WeakSet[nn.Module] = WeakSet()


@contextmanager
def arithmetic(device: torch.device, *, tf32: bool = False) -> Iterator[None]:
    """Deterministic convolutions inside, and float32 products as they are written: TF32 on a GPU if asked for.

    PyTorch allows TF32 in convolutions and picks their kernels by what runs first unless told otherwise. It asks at
    the time a kernel starts, so a backward pass belongs inside too.
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
    """Only kernels that add in one order inside, those of attention and cuBLAS among them.

    A GPU's others add as their threads come. A CPU's need no telling: nothing changes there.

    Raises:
        RuntimeError: by an operation that has no such kernel, where it is called.
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
    fills.fill_uninitialized_memory = False  # no pass over memory that is written next
    try:
        yield
    finally:
        fills.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(strict, warn_only=warns)


def in_fixed_order(model: nn.Module, device: torch.device, passes: Callable[[], T]) -> T:
    """The result of some passes of a model, in `fixed_order` if all of its operations have kernels for that.

    A model that turns out to have others is remembered, also in other wrappings, and runs with any kernels from then
    on: what failed need not fail again for every batch that is wrapped on its own.
    """
    inside = _inside(model)
    if inside not in _IN_ANY_ORDER:
        try:
            with fixed_order(device):
                return passes()
        except RuntimeError as error:
            if device.type != "cuda" or "determin" not in str(error).lower():
                raise
            _IN_ANY_ORDER.add(inside)
    return passes()


def _inside(model: nn.Module) -> nn.Module:
    """The module that wrappers are around, each with one child."""
    while len(children := list(model.children())) == 1:
        model = children[0]
    return model


def quotient(numbers: Tensor, by: float) -> Tensor:
    """Numbers divided by one, in their dtype and rounded once, the same on every device.

    On a GPU torch multiplies by the inverse of a number of Python's, which is off by one in the last place for half
    of the grey levels.
    """
    return numbers / torch.full((), by, dtype=numbers.dtype, device=numbers.device)
