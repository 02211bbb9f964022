"""Batches copied to a GPU while it works on the one before."""

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
    """The same batches on a device, in the same order; when one is given, the copy of the next has begun.

    On a GPU copies have a stream of their own, which the work on a batch waits for and the process does not. What
    cannot be read is raised in its turn, after the batches before it.

    Args:
        batches: in page-locked memory, where the device is a GPU; closed with this.
        device: where they are wanted.
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
    """The next batch, whose copy has begun; None at the end."""
    batch = next(source, None)
    if batch is None:
        return None
    within: AbstractContextManager[object] = nullcontext() if side is None else torch.cuda.stream(side)
    with within:
        return _OnItsWay(batch.to(device), None if side is None else side.record_event())


def _arrived(coming: _OnItsWay, device: torch.device) -> Batch:
    """A batch that what is asked of the device from now on finds there."""
    if coming.copied is not None:
        here = torch.cuda.current_stream(device)
        here.wait_event(coming.copied)
        for tensor in coming.batch.tensors():
            tensor.record_stream(here)  # its memory was taken in the other stream, and must outlast the work in this
    return coming.batch
