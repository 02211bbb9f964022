"""Transport of batches from data workers: in shared memory, or through a pipe where shared memory is short.

Torch's loader puts tensors into /dev/shm, which has only 64 MB in a Docker container by default. If it is full, a
background thread of the worker fails silently and the batch never arrives. So a worker checks the free space first;
a batch that might not fit goes through the pipe as bytes, which is slower by one or two copies but always works.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from storage_schemas import DatamergeError
from trainer.data.batches import Batch

SHARED_MEMORY = "/dev/shm"
# Loaders at work at the same time: training reads ahead while the held-out groups are read.
LOADERS = 2


@dataclass(frozen=True, slots=True)
class Parcel:
    """A batch as bytes.

    Attributes:
        data: the batch, written by torch.save: plain pickle does not support tensors of unsigned integers.
        tensors: bytes of its tensors.
        free: bytes of shared memory that were free.
    """

    data: bytes
    tensors: int
    free: int

    def open(self) -> Batch:
        """Unpack the batch."""
        batch: Batch = torch.load(io.BytesIO(self.data), weights_only=False)  # trusted: from our own worker
        return batch


@dataclass(frozen=True, slots=True)
class Shipping:
    """Collates batches in a worker, and packs those that may not fit into shared memory.

    Attributes:
        collate: stacks items to a batch.
        senders: number of workers on this machine that may send at the same time.
    """

    collate: Callable[[list[Any]], Batch | DatamergeError]
    senders: int

    def __call__(self, items: list[Any]) -> Batch | Parcel | DatamergeError:
        batch = self.collate(items)
        if isinstance(batch, DatamergeError):
            return batch
        free, size = free_shared_memory(), batch.nbytes
        # Enough even if all workers check first and then all send.
        if free is None or free >= size * (self.senders * LOADERS + 1):
            return batch
        data = io.BytesIO()
        torch.save(batch, data)
        return Parcel(data.getvalue(), size, free)


def senders(workers: int) -> int:
    """Number of data workers of all processes that torchrun started on this machine."""
    return workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_shared_memory() -> int | None:
    """Free shared memory in bytes; None on systems without `SHARED_MEMORY`."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
