"""Runs a shard's groups through the encoder in batches, while a second thread prepares inputs and makes records.

    second thread    inputs 1   inputs 2            records 1, inputs 3     records 2, inputs 4
    encoder                     batch 1             batch 2                 batch 3

One thread makes all inputs and records, in this order, so at most two batches wait for it.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from merge_service.adversarial_groups import Batch
from merge_service.grouping import Group
from merge_service.reading import Pixels
from storage_schemas import Record, Reject
from storage_schemas.access.threads import result_of

Inputs = TypeVar("Inputs")
Made = TypeVar("Made")


class Maker(Protocol[Inputs, Made]):
    """Makes records of clean images, a batch at a time: `inputs` and `records` in any thread, `run` in one."""

    groups_per_batch: int

    def inputs(self, batch: Batch, /) -> Inputs:
        """The encoder's inputs for a batch."""

    def run(self, batch: Batch, inputs: Inputs, rejects: list[Reject], /) -> Made | None:
        """Run the encoder on a batch; None if all groups were rejected."""

    def records(self, made: Made, /) -> list[Record]:
        """The records of a batch, in the order of its groups."""


class BatchesAhead(Generic[Inputs, Made]):
    """The batches of one shard. The inputs of the first batch are made at once, before `run` is called.

    Args:
        groups: groups with their clean images; the list is emptied as they are used.
        beside: an executor with one thread, for inputs and records.
        rejects: receives the groups that cannot be used.
    """

    def __init__(
        self,
        maker: Maker[Inputs, Made],
        groups: list[tuple[Group, Pixels]],
        beside: ThreadPoolExecutor,
        rejects: list[Reject],
    ) -> None:
        self._maker, self._groups, self._beside, self._rejects = maker, groups, beside, rejects
        self._made: deque[Future[list[Record]]] = deque()
        self._upcoming = self._next()

    def run(self) -> None:
        """Put all groups through the encoder; nothing else may use the encoder meanwhile."""
        while self._upcoming is not None:
            batch, inputs = self._upcoming[0], result_of(self._upcoming[1])
            self._upcoming = self._next()
            made = self._maker.run(batch, inputs, self._rejects)
            if made is not None:
                self._made.append(self._beside.submit(self._maker.records, made))

    def records(self) -> list[Record]:
        """Wait for all records and return them in the order of the groups; no reference to them is kept."""
        records: list[Record] = []
        while self._made:
            made: list[Record] = result_of(self._made.popleft())
            records += made
        return records

    def _next(self) -> tuple[Batch, Future[Inputs]] | None:
        number = self._maker.groups_per_batch
        batch = self._groups[:number]
        del self._groups[:number]
        return (batch, self._beside.submit(self._maker.inputs, batch)) if batch else None
