"""Prefetching of remote records. The order of a run is a function of its settings, so future reads are known.

Two threads of the reading process run through the order ahead of the reader:

near    requests the records of the next batches, in order, up to `NEAR_BYTES` ahead;
far     fills the cache, if there is one: for a section of the run (`SECTION` groups) it fetches what will be read of
        each shard, in order of first use, in requests of megabytes. The shards are divided among the processes of the
        machine, which share the cache.

Nothing is fetched that the run does not read before its last step. Errors are ignored here: the reader meets the same
error and reports it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import dropwhile, islice
from typing import NamedTuple

import numpy as np

from storage_schemas import DatamergeError
from trainer.data.blend import Blend
from trainer.data.order import Order, Partition, Share
from trainer.data.permutation import IntArray

# Bytes of records requested and not read yet, over all data workers of a process. Without a cache they are in memory.
NEAR_BYTES = 256 * 2**20
# Largest number of micro-batches requested together; the sidecars of their shards are read at the same time.
NEAR_PIECES = 16
SECTION = 2**18  # groups; about as many as are shuffled together
SHARDS = 32  # shards whose sidecars are requested together
PATIENCE = 0.2  # seconds between two checks of a condition, in case a notification is missed
PATIENCE_AT_THE_END = 5.0  # seconds to wait for an unfinished request; its thread then ends with the process


class Piece(NamedTuple):
    """A micro-batch of a process.

    Attributes:
        position: its number among the micro-batches of the process, counted from 0.
        step: the step that it belongs to.
        share: its groups.
    """

    position: int
    step: int
    share: Share


@dataclass(frozen=True, slots=True)
class Course:
    """The part of a run that one process reads: its micro-batches of the steps [start, stop)."""

    order: Order
    partition: Partition
    start: int
    stop: int

    def pieces(self, first: int | None = None, position: int = 0) -> Iterator[Piece]:
        """The micro-batches in order, from step `first` on (by default all); `position` is that of the first one."""
        for step in range(self.start if first is None else first, self.stop):
            for share in self.order.shares(step, self.partition):
                yield Piece(position, step, share)
                position += 1

    def groups_here(self, start: int, groups: int) -> tuple[int, IntArray]:
        """Groups that all processes of this machine read from a step on.

        Args:
            start: first step.
            groups: approximate number of groups to list.

        Returns:
            The step after the last listed one, and the indices of the groups in order of use.
        """
        order, own, (rank, processes) = self.order, self.partition, _on_this_machine(self.partition)
        share = processes / own.world
        stop = min(self.stop, start + max(1, int(groups / share * order.steps_per_epoch / order.groups)))
        wanted = order.batches_joined(start, stop)
        if processes < own.world:
            sizes = np.array([order.batch_size_of(step) for step in range(start, stop)])
            place = np.arange(len(wanted)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            first, last = ((own.rank - rank + more) * np.repeat(sizes, sizes) // own.world for more in (0, processes))
            wanted = wanted[(first <= place) & (place < last)]
        return stop, wanted


class Ahead:
    """Prefetches the records of a course for one of its readers.

    Args:
        groups: the artifacts that are read, at least one of them remote.
        course: the order in which they are read.
        worker: number of this reader among the data workers of its process, which take micro-batches in turn.
        workers: number of data workers of the process.
    """

    def __init__(self, groups: Blend, course: Course, worker: int = 0, workers: int = 1) -> None:
        self._groups, self._course = groups, course
        self._worker, self._workers = worker, workers
        self._changed = threading.Condition()
        self._expected = self._reached = -1  # positions
        self._step, self._began = course.start, 0  # the reader's step, and the position at which it came to it
        self._ahead: deque[tuple[int, int]] = deque()  # (position, bytes) of requested blocks that are not read yet
        self._closed = threading.Event()
        self._fills_all = False  # whether all groups of the run were announced to be filled
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"datamerge-{work.__name__[1:]}", daemon=True)
            for work in (self._near, self._far)
        ]
        for thread in self._threads:
            thread.start()

    def reach(self, position: int, step: int) -> None:
        """Report that the reader has reached a micro-batch; returns once its records have been requested."""
        with self._changed:
            if step != self._step:
                self._began = position
            self._reached, self._step = position, step
            while self._ahead and self._ahead[0][0] < position:
                self._ahead.popleft()
            self._changed.notify_all()
            self._wait(lambda: self._expected >= position)

    def close(self) -> None:
        """Stop fetching and release waiting readers; may be called more than once."""
        with self._changed:
            self._closed.set()
            self._changed.notify_all()
        self._groups.expect_nothing()
        for thread in self._threads:
            thread.join(PATIENCE_AT_THE_END)
        self._groups.expect_nothing()  # that a thread announced meanwhile

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        finally:
            if work == self._near:
                with self._changed:
                    self._expected = np.iinfo(np.int64).max  # the reader waits for nothing any more
                    self._changed.notify_all()

    def _wait(self, until: Callable[[], bool]) -> bool:
        """Wait on `_changed`, which the caller holds, until the condition is true; False if closed."""
        while not self._closed.is_set() and not until():
            self._changed.wait(PATIENCE)
        return not self._closed.is_set()

    def _near(self) -> None:
        mine: Iterator[Piece] = islice(self._course.pieces(), self._worker, None, self._workers)
        budget, count = NEAR_BYTES // self._workers, 1
        while block := list(islice(mine, count)):
            last = block[-1].position
            size, is_sound = 0, True
            try:
                size = self._groups.expect([index for piece in block for index in piece.share.indices])
            except (DatamergeError, OSError):
                is_sound = False
            with self._changed:
                self._expected = last
                self._ahead.append((last, size))
                self._changed.notify_all()
                # A block takes at most a quarter of the budget. Two blocks, however large, are always allowed.
                count = max(1, min(2 * count, NEAR_PIECES, budget * len(block) // (4 * max(size, 1))))
                # After a failure, wait until the reader has passed the same block.
                least = -1 if is_sound else last
                if not self._wait(lambda least=least: self._reached >= least and self._has_room(budget)):  # type: ignore[misc]  # bound now
                    return
            if self._is_all_here():
                mine = self._rest()
                if self._closed.is_set():
                    return

    def _is_all_here(self) -> bool:
        return self._fills_all and self._groups.is_filled

    def _rest(self) -> Iterator[Piece]:
        """Announce nothing while all is in the cache: each announcement and each wake-up would delay the reader.

        Returns:
            The micro-batches after the one that the reader has reached.
        """
        with self._changed:
            announced, self._expected = self._expected, np.iinfo(np.int64).max
            self._changed.notify_all()
        while not self._closed.is_set() and self._is_all_here():
            self._closed.wait(PATIENCE)
        with self._changed:
            last = self._expected = max(announced, self._reached)
            # The only reader of the machine, so it meets every position.
            rest = self._course.pieces(self._step, self._began)
        return dropwhile(lambda piece: piece.position <= last, rest)

    def _has_room(self, budget: int) -> bool:
        return len(self._ahead) < 2 or sum(size for _, size in self._ahead) < budget

    def _far(self) -> None:
        with self._changed:
            if not self._wait(lambda: self._expected >= 0):
                return
        room = self._groups.cache_bytes
        if not room:
            return
        needed = max(1, self._groups.bytes_read)
        groups = min(SECTION, 2 * self._course.order.groups, room // 2 * len(self._groups) // needed)
        ends = np.cumsum(self._groups.shard_sizes)
        rank, processes = _on_this_machine(self._course.partition)
        part, parts = rank * self._workers + self._worker, processes * self._workers
        start = self._course.start
        while start < self._course.stop and groups:
            stop, wanted = self._course.groups_here(start, groups)
            places, is_sound = np.unique(wanted), True
            is_all = len(places) == len(self._groups) and needed <= room
            for indices in _by_shard(wanted, places, ends, part, parts):
                if self._closed.is_set():
                    return
                try:
                    self._groups.fill(indices)
                except (DatamergeError, OSError):
                    is_sound = False
            if is_all:
                self._fills_all = is_sound and parts == 1
                return
            middle = (start + stop) // 2
            with self._changed:
                if not self._wait(lambda middle=middle: self._step >= middle):  # type: ignore[misc]  # bound now
                    return
            start = stop


def _by_shard(wanted: IntArray, places: IntArray, ends: IntArray, part: int, parts: int) -> Iterator[list[int]]:
    """Indices of the groups to fetch from every `parts`-th shard, `SHARDS` shards at a time, in order of first use.

    Args:
        wanted: indices of groups in order of use.
        places: the same indices, sorted and without repetition.
        ends: index after the last group of each shard.
        part: number of this reader among those of the machine.
        parts: number of readers on the machine.
    """
    shards, first = np.unique(np.searchsorted(ends, wanted, "right"), return_index=True)
    mine = shards[np.argsort(first)][part::parts]
    starts = np.concatenate([[0], ends])
    for at in range(0, len(mine), SHARDS):
        indices: list[int] = []
        for shard in mine[at : at + SHARDS]:
            span = np.searchsorted(places, [starts[shard], starts[shard + 1]])
            indices += places[span[0] : span[1]].tolist()
        yield indices


def _on_this_machine(partition: Partition) -> tuple[int, int]:
    """Rank of this process among the run's processes on this machine, and their number, from torchrun's variables."""
    processes, rank = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    is_known = processes <= partition.world and 0 <= partition.rank - rank <= partition.world - processes
    return (rank, processes) if is_known and rank < processes else (0, 1)
