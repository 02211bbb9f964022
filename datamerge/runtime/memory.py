"""Whether a device's memory was too small."""

from __future__ import annotations

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says so: the CPU's allocator and some CUDA libraries raise a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )
