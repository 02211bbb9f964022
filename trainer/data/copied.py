"""Copy batches to a GPU while it still computes on the previous batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch

from storage_schemas import DatamergeError
from trainer.data.batches import Batch
from trainer.data.stream import ended


class _OnItsWay(NamedTuple):
    batch: Batch
    copied: torch.cuda.Event | None


def copied_ahead(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield the batches on a device, in order; when one is yielded, the copy of the next has already begun.

    On a GPU copies run in a separate stream, for which kernels wait but the process does not. A read error is raised
    after the batches before it have been yielded.

    Args:
        batches: batches, in page-locked memory if the device is a GPU; this generator closes them.
        device: the target device.
    """
    side = torch.cuda.Stream(device) if device.type == "cuda" else None
    with ended(batches) as source:
        coming = _begun(source, device, side)
        while coming is not None:
            batch, following, error = _arrived(coming, device), None, None
            try:
                following = _begun(source, device, side)
            except DatamergeError as caught:
                error = caught
            yield batch
            if error is not None:
                raise error
            coming = following


def _begun(source: Iterator[Batch], device: torch.device, side: torch.cuda.Stream | None) -> _OnItsWay | None:
    """Begin to copy the next batch; None at the end."""
    batch = next(source, None)
    if batch is None:
        return None
    within: AbstractContextManager[object] = nullcontext() if side is None else torch.cuda.stream(side)
    with within:
        return _OnItsWay(batch.to(device), None if side is None else side.record_event())


def _arrived(coming: _OnItsWay, device: torch.device) -> Batch:
    """Make kernels launched from now on wait for the copy, and return the batch."""
    if coming.copied is not None:
        here = torch.cuda.current_stream(device)
        here.wait_event(coming.copied)
        for tensor in coming.batch.tensors():
            tensor.record_stream(here)  # allocated in the other stream; must not be reused before this one is done
    return coming.batch
