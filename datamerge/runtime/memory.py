"""Advice in place of an out-of-memory error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from storage_schemas import DatamergeError


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says so: the CPU's allocator and some CUDA libraries raise a plain RuntimeError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(
        text in str(error) for text in ("out of memory", "can't allocate memory")
    )


@contextmanager
def out_of_memory_advice(advice: Callable[[], str]) -> Iterator[None]:
    """Turn an out-of-memory error inside the block into a DatamergeError that names the settings to lower.

    Args:
        advice: makes the message, in front of which stands `batch_size`; called only after such an error.

    Raises:
        DatamergeError: the block ran out of memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise DatamergeError(f"batch_size: {advice()}", about="batch_size") from error
