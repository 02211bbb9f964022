"""What float32 means on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
