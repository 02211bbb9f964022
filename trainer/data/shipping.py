"""Batches on their way out of data workers: in shared memory, or through a pipe where that is short.

Torch's loader puts tensors into /dev/shm, of which Docker gives a container 64 MB. In a worker that finds it full a
thread fails that nobody listens to, and the batch never comes. So a worker looks before it sends, and what does not
fit for sure goes through the pipe as bytes: slower, by a copy or two, and always possible.
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
        data: the batch, as torch.save writes it: plain pickle cannot take unsigned integers.
        tensors: bytes of its tensors.
        free: bytes of shared memory that there were.
    """

    data: bytes
    tensors: int
    free: int

    def open(self) -> Batch:
        """The batch."""
        batch: Batch = torch.load(io.BytesIO(self.data), weights_only=False)  # of a process of ours
        return batch


@dataclass(frozen=True, slots=True)
class Shipping:
    """Makes batches in a worker, in the form in which they can be sent.

    Attributes:
        collate: stacks items to a batch.
        senders: workers on this machine that may send at the same moment.
    """

    collate: Callable[[list[Any]], Batch | DatamergeError]
    senders: int

    def __call__(self, items: list[Any]) -> Batch | Parcel | DatamergeError:
        batch = self.collate(items)
        if isinstance(batch, DatamergeError):
            return batch
        free, size = free_shared_memory(), batch.nbytes
        # If all of them look, and then all send, the last one's batch still has a place.
        if free is None or free >= size * (self.senders * LOADERS + 1):
            return batch
        data = io.BytesIO()
        torch.save(batch, data)
        return Parcel(data.getvalue(), size, free)


def senders(workers: int) -> int:
    """Data workers of all processes that torchrun started on this machine."""
    return workers * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_shared_memory() -> int | None:
    """Bytes; None on systems whose shared memory is no folder."""
    try:
        found = os.statvfs(SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
