"""Prefetching of the files of one remote location: many requests at a time, each byte once.

A run knows in advance what it will read and announces it (`expect`, `fill`). Threads fetch in this order:

1. ranges that a reader waits for now (`read`); one request is always kept free for them;
2. expected ranges, in the order of their announcement. Neighbours share a request. Where the surrounding bytes are to
   be filled as well, they are included, so that no request is for less than `SMALLEST`;
3. the rest of the files to be filled, in large requests, of which a quarter as many are made at a time.

With a cache everything goes through its copies (`copying`, `folder`): ranges and whole files are stored in the same
way, and bytes that another process has fetched, or is fetching, are not fetched again. Without a cache, where it has
no room, and after its disk has failed, expected ranges stay in memory until they have been read as often as they were
announced; that memory is bounded. Prefetching never evicts a copy that was used since the run began: with a random
order all files are in use all the time, and an evicted file would have to be fetched again.

Failures of prefetching are ignored: the reader repeats the request and raises the server's error.
"""

from __future__ import annotations

import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from storage_schemas.access.block_file import BLOCK, BlockFile, Bytes
from storage_schemas.access.copying import LARGEST, Copies, NoDisk
from storage_schemas.access.fast_reads import RangeReads
from storage_schemas.access.fills import SMALLEST, Fills
from storage_schemas.access.location import Location
from storage_schemas.access.pieces import Pieces, Range
from storage_schemas.access.request_threads import Job, Patience, RequestThreads

if TYPE_CHECKING:
    from storage_schemas.access.cache import Cache

REQUESTS = 64  # at a time, of a few hundred KB each
LARGE = 4  # a large request counts as this many
FLYING = 32 * 2**20  # bytes in flight up to which more expected ranges than large requests are fetched
AHEAD_BYTES = 256 * 2**20  # bytes of ranges kept in memory, without a cache or without room in it
GAP = 16 * 2**10  # bytes between two ranges up to which they share a request
POLL_SECONDS = 0.005  # between two checks of what another process is fetching
POLLS = 20  # checks before testing whether that process is still alive


class Fetcher(RequestThreads):
    """Fetches for one location, in one process; `fetchers.fetcher_of` gives the one that all its readers share."""

    def __init__(
        self,
        location: Location,
        cache: Cache | None,
        *,
        requests: int = REQUESTS,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        """Create an idle fetcher.

        Args:
            location: must be remote.
            cache: where copies are stored; None for memory alone.
            requests: largest number of requests at a time.
            ahead_bytes: limit of expected ranges in flight or in memory.
        """
        super().__init__(location.url, requests)
        self._location, self._ranges = location, RangeReads(location)
        self._kept = None if cache is None else Copies(location, cache.copies)
        self._sizes: dict[str, int] = {}
        self._expected: OrderedDict[Range, None] = OrderedDict()
        self._fills = Fills()
        self._pieces = Pieces(ahead_bytes)
        self._began = time.time_ns()
        self._is_announced = False  # whether `expect` or `fill` was called

    # Methods for readers.

    def expect(self, ranges: Iterable[Range], sizes: Mapping[str, int], *, once: bool = False) -> None:
        """Queue ranges that will be read, in order of first use.

        Args:
            sizes: bytes of their files, according to the sidecars.
            once: they are read once, however often they are announced before.
        """
        with self._changed:
            self._is_announced = True
            self._sizes.update(sizes)
            for item in ranges:
                if item.start >= item.end or self._is_here(item) or (once and self._pieces.is_due(item)):
                    continue
                if self._pieces.expect(item):
                    self._expected.setdefault(item)
            self._start_threads()

    def fill(self, ranges: Iterable[Range], sizes: Mapping[str, int]) -> None:
        """Queue whole files, or large parts of them, in order of first use; does nothing without a cache.

        Args:
            sizes: bytes of these files, according to the sidecars.
        """
        with self._changed:
            self._is_announced = True
            self._sizes.update(sizes)
            if self._copies is not None:
                self._fills.add(ranges)
                self._start_threads()

    @property
    def is_filled(self) -> bool:
        """Whether all that was to be filled is on the disk; False again after a copy of it was evicted and missed."""
        return self._fills.are_done

    @property
    def held(self) -> int:
        """Bytes of expected ranges in flight and in memory."""
        with self._changed:
            return self._pieces.held

    def forget_expected(self) -> None:
        """Drop all queued ranges and those in memory: they will not be read."""
        with self._changed:
            self._expected.clear()
            self._fills.clear()
            self._pieces.clear()

    def read(self, path: str, start: int, end: int, size: int | None = None) -> Bytes:
        """Bytes [start, end) of a file, fewer past its end; read-only.

        Args:
            size: bytes of the file according to its sidecar; by default as announced, else asked of the server.

        Raises:
            FileNotFoundError: no such file.
            CorruptShard: it is shorter than `size`.
            DatamergeError: see `Location.sent`.
        """
        item, copies = Range(path, start, end), self._copies
        found = None if copies is None else copies.here(path, start, end, size)
        if found is not None and not self._pieces.is_due(item):
            return found
        try:
            if not self._dequeue(item) and copies is not None:
                with suppress(NoDisk):
                    size = self._size(path, size)
                    if (found := self._from_disk(copies, path, start, end, size)) is not None:
                        return found
            return self._from_memory(item)
        finally:
            self._release(item)

    def read_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Same as `Location.read`; a whole file of unknown size takes one request."""
        copies = self._copies
        if start is None and end is None and path not in self._sizes and copies is not None:
            try:
                return self._wait_for(path, lambda: copies.keep(path))
            except NoDisk:
                pass
        size = self._size(path)
        return self.read(path, start or 0, size if end is None else min(end, size), size).tobytes()

    @property
    def is_quiet(self) -> bool:
        """Whether all is filled and no announced range is left to read: reads of the disk need no account then."""
        return self._fills.are_done and not self._pieces.are_due

    def settled(self, path: str) -> BlockFile | None:
        """The copy of a file, if it may be read without this fetcher: it is complete, or `is_quiet`."""
        file = None if (copies := self._copies) is None else copies.opened(path)
        return file if file is not None and (file.is_complete or self.is_quiet) and file.is_kept else None

    def whole_path(self, path: str) -> str | None:
        """Path of the complete copy of a file, fetched if needed; None without a cache or without room in it."""
        copies = self._copies
        if copies is None:
            return None
        try:
            size = self._size(path)
            if self._from_disk(copies, path, 0, size, size) is None:
                return None
            return copies.published(copies.open(path, size))
        except NoDisk:
            return None

    def forget(self, path: str) -> bool:
        """Drop the copy of a file; True if there was one."""
        with self._changed:
            self._sizes.pop(path, None)
            self._pieces.forget(path)
        return self._kept is not None and self._kept.forget(path)

    def _next_ahead(self, most: int) -> Job | None:
        while self._expected and self._is_here(item := next(iter(self._expected)), or_coming=True):
            del self._expected[item]
        large = max(1, most // LARGE)
        if self._expected:
            may_expect = self._active["expected"] < large or self._pieces.flying < FLYING
            work = self._expected_work() if may_expect else None
            return None if work is None else ("expected", work)
        while self._fills and self._is_here(item := self._fills.first):
            self._fills.done(item)
        if self._fills and self._active["fill"] < large:
            return "fill", functools.partial(self._fill, self._fills.take())
        if self._fills.are_elsewhere and not self._active["fill"]:
            return "fill", self._retry_fills
        return None

    # Copies on a disk.

    @property
    def _copies(self) -> Copies | None:
        return None if self._kept is None or self._kept.failed else self._kept

    def _is_here(self, item: Range, *, or_coming: bool = False) -> bool:
        """Whether the range is known to be on the disk; with `or_coming`, also if it is being fetched."""
        file = None if (copies := self._copies) is None else copies.opened(item.path)
        return file is not None and not file.missing(item.start, item.end, or_coming=or_coming)

    def _size(self, path: str, size: int | None = None) -> int:
        if size is None:
            size = self._sizes.get(path)
        if size is None and (copies := self._copies) is not None:
            with suppress(NoDisk):
                whole = copies.whole(path)
                size = None if whole is None else whole.size
        if size is None:
            size = self._wait_for(path, lambda: self._location.size(path))
        self._sizes[path] = size
        return size

    def _from_disk(self, copies: Copies, path: str, start: int, end: int, size: int) -> Bytes | None:
        """Bytes of the copy, after waiting for them; None if there is no room for them."""
        item, end = Range(path, start, end), min(end, size)
        patience = self._patience(path)
        used = self._began if self._is_announced else None
        while True:
            file = copies.used(path, copies.open(path, size))
            if file.missing(start, end):
                file.refresh(start // BLOCK, -(-end // BLOCK))
            if start >= end or not file.missing(start, end):
                return file.view[start:end]
            with self._changed:
                self._fills.lost(item)
            if not copies.has_ranges:
                if not self._wait_for(path, lambda: copies.download(path, size)):
                    return None
                continue
            if end - start > LARGEST:  # let the other threads help
                self._fill_first(Range(path, start, end))
            fetched = None
            if file.missing(start, end, or_coming=True):
                fetched = self._wait_for(
                    path, functools.partial(copies.fetch, path, file, *self._widened(start, end, size), used)
                )
            if fetched is False or (fetched is None and not self._arrives(copies, file, item, end, patience)):
                return None

    def _arrives(self, copies: Copies, file: BlockFile, item: Range, end: int, patience: Patience) -> bool:
        """Wait a while for a range that others are fetching to the disk; False if they had no room for it."""
        for _ in range(POLLS):
            if self._pieces.has(item):
                return False
            if not file.missing(item.start, end):
                break
            with copies.folder.changed:
                patience.wait(copies.folder.changed, POLL_SECONDS)
            file.refresh(item.start // BLOCK, -(-end // BLOCK))
        return True

    def _widened(self, start: int, end: int, size: int) -> tuple[int, int]:
        """The range to fetch for a reader: widened by its surroundings unless all reads are announced."""
        if self._is_announced or end - start > LARGEST:
            return start, end
        first = start // LARGEST * LARGEST
        return first, min(max(end, first + LARGEST), size)

    def _fill(self, item: Range) -> None:
        """Fetch the next missing part of a range to the disk."""
        path, start, end = item
        size, copies = self._sizes.get(path), self._copies
        if copies is None or size is None:
            return
        file, fetched = copies.touched(copies.open(path, size)), None
        if file.missing(start, end):
            if not copies.has_ranges:
                if copies.download(path, size):
                    with self._changed:
                        self._fills.done(item)
                return
            # The next thread fetches the part after this one.
            fetched = copies.fetch(path, file, start, end, self._began, claimed=lambda: self._fill_first(item))
            if fetched:
                return
        with self._changed:
            if file.missing(start, end):
                self._fills.drop(item, is_elsewhere=fetched is None)
            else:
                self._fills.done(item)

    def _fill_first(self, item: Range) -> None:
        with self._changed:
            self._fills.put_first(item)
            self._start_threads()

    def _retry_fills(self) -> None:
        with self._changed:
            self._changed.wait(0.2)
            self._fills.look_again()

    # Expected ranges.

    def _expected_work(self) -> Callable[[], None] | None:
        """Work that fetches the first expected range and its neighbours; None if memory has no room for them."""
        items: list[Range] = []
        for item in self._expected:
            if items and not (
                item.path == items[0].path
                and 0 <= item.start - items[-1].end <= GAP
                and item.end - items[0].start <= SMALLEST
            ):
                break
            items.append(item)
        if not self._pieces.has_room(items):
            return None
        for item in items:
            del self._expected[item]
        self._pieces.begin(items, to_memory=self._copies is None)
        return lambda: self._fetch_expected(items)

    def _fetch_expected(self, items: list[Range]) -> None:
        pieces: dict[Range, Bytes] = {}
        try:
            if rest := self._fetch_to_disk(items):
                with self._changed:
                    self._pieces.turn(rest)
                path, start, end = rest[0].path, rest[0].start, rest[-1].end
                data = np.frombuffer(self._ranges.get(path, start, end), np.uint8)
                pieces = {item: data[item.start - start : item.end - start] for item in rest}
        finally:
            with self._changed:
                self._pieces.end(items)
                for item, piece in pieces.items():
                    self._pieces.keep(item, piece)

    def _fetch_to_disk(self, items: list[Range]) -> list[Range]:
        """Fetch neighbouring ranges to the disk, and return those for which it has no room."""
        path, start, end = items[0].path, items[0].start, items[-1].end
        size, copies = self._sizes.get(path), self._copies
        if size is None or copies is None:
            return items
        with suppress(NoDisk):
            file = copies.touched(copies.open(path, size))
            start, end = self._fills.around(path, start, min(end, size))
            while copies.has_ranges and start < end and file.missing(start, end):
                fetched = copies.fetch(path, file, start, end, self._began)
                if fetched is None:  # other threads or processes are fetching the missing blocks
                    return []
                if not fetched:
                    return [item for item in items if file.missing(item.start, min(item.end, size))]
            return []
        return items

    def _dequeue(self, item: Range) -> bool:
        """Remove a range from the queue; True if it is in memory, or on its way there."""
        with self._changed:
            if item in self._expected:
                del self._expected[item]
                self._pieces.make_room()
            return self._pieces.has(item)

    def _release(self, item: Range) -> None:
        """Release a range that has been read; queue it again if it will be read again and has to be fetched."""
        with self._changed:
            if self._pieces.leave(item):
                self._expected.setdefault(item)
            self._start_threads()

    def _from_memory(self, item: Range) -> Bytes:
        patience = self._patience(item.path)
        with self._changed:
            while self._pieces.is_flying(item):
                patience.wait(self._changed)
            if (piece := self._pieces.get(item)) is not None:
                return piece
            self._pieces.begin([item], to_memory=True)  # so that it is not queued meanwhile
        data = None
        try:
            data = np.frombuffer(self._wait_for(item.path, lambda: self._ranges.get(*item)), np.uint8)
        finally:
            with self._changed:
                self._pieces.end([item])
                if data is not None:
                    self._pieces.keep(item, data)
                self._changed.notify_all()
        return data
