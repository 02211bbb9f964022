"""Queue of low-priority fetches for the cache: whole files, or large parts of them."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from storage_schemas.access.pieces import Range

SMALLEST = 512 * 2**10  # bytes of a request, unless fewer are left to fetch


class Fills:
    """Queued ranges in order of first use. Not thread-safe: the owner's lock guards it."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Range, None] = OrderedDict()
        self._elsewhere: dict[Range, None] = {}  # being fetched by others
        self._of: dict[str, list[Range]] = {}  # by path, the ranges of the last `add`, sorted
        self._undone: set[Range] = set()  # added, and not known to be on the disk

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def are_elsewhere(self) -> bool:
        """Whether other processes are fetching any of the ranges."""
        return bool(self._elsewhere)

    def add(self, ranges: Iterable[Range]) -> None:
        """Queue ranges."""
        ranges = list(ranges)
        self._undone.update(ranges)
        self._of |= {path: sorted(of) for path, of in groupby(ranges, attrgetter("path"))}
        for item in ranges:
            if item not in self._elsewhere:
                self._waiting.setdefault(item)

    def put_first(self, item: Range) -> None:
        """Queue a range before all others."""
        self._waiting[item] = None
        self._waiting.move_to_end(item, last=False)

    @property
    def are_done(self) -> bool:
        """Whether ranges were added, and all are on the disk as far as is known."""
        return bool(self._of) and not self._undone

    def done(self, item: Range) -> None:
        """Remove a range that is on the disk."""
        self._waiting.pop(item, None)
        self._undone.discard(item)

    def lost(self, item: Range) -> None:
        """Queue the added range that contains one which is not on the disk, unless it is still to be fetched."""
        added = self._added(*item)
        if added is not None and added not in self._undone:  # its copy has been evicted
            self._undone.add(added)
            self._waiting.setdefault(added)

    @property
    def first(self) -> Range:
        """The first range; there must be one."""
        return next(iter(self._waiting))

    def take(self) -> Range:
        """Remove and return the first range."""
        return self._waiting.popitem(last=False)[0]

    def drop(self, item: Range, *, is_elsewhere: bool) -> None:
        """Remove a range that is not fetched. If others are fetching it, `look_again` queues it again."""
        self._waiting.pop(item, None)
        if is_elsewhere:
            self._elsewhere[item] = None

    def look_again(self) -> None:
        """Queue again the ranges that other processes were fetching, in case one of them was killed."""
        self._waiting.update(self._elsewhere)
        self._elsewhere.clear()

    def clear(self) -> None:
        """Remove all ranges."""
        self._waiting.clear()
        self._elsewhere.clear()
        self._of.clear()
        self._undone.clear()

    def around(self, path: str, start: int, end: int) -> tuple[int, int]:
        """Widen [start, end) to multiples of `SMALLEST` bytes within the added range that contains it, if any."""
        added = self._added(path, start, end)
        if added is None:
            return start, end
        _, first, last = added
        before, after = (start - first) // SMALLEST, -(-(end - first) // SMALLEST)
        return first + before * SMALLEST, min(first + after * SMALLEST, last)

    def _added(self, path: str, start: int, end: int) -> Range | None:
        """The added range that contains [start, end), if any."""
        added = self._of.get(path, [])
        at = bisect.bisect_right(added, start, key=attrgetter("start")) - 1
        return added[at] if at >= 0 and end <= added[at].end else None
