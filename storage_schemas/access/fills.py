"""What is to be fetched behind all that is expected: whole files, or large parts of them."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Iterable
from itertools import groupby
from operator import attrgetter

from storage_schemas.access.pieces import Range

SMALLEST = 512 * 2**10  # bytes of a request, where as many are wanted


class Fills:
    """Ranges that wait, in order of first use. Not safe for threads: its owner's lock guards it."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[Range, None] = OrderedDict()
        self._elsewhere: dict[Range, None] = {}  # just being fetched by other processes
        self._of: dict[str, list[Range]] = {}  # all that was added last of a file, sorted

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def are_elsewhere(self) -> bool:
        """Whether other processes are fetching any."""
        return bool(self._elsewhere)

    def add(self, ranges: Iterable[Range]) -> None:
        """Queue ranges."""
        ranges = list(ranges)
        self._of |= {path: sorted(of) for path, of in groupby(ranges, attrgetter("path"))}
        for item in ranges:
            if item not in self._elsewhere:
                self._waiting.setdefault(item)

    def put_first(self, item: Range) -> None:
        """Have a range fetched before all others."""
        self._waiting[item] = None
        self._waiting.move_to_end(item, last=False)

    def take(self) -> Range:
        """The first, which waits no longer."""
        return self._waiting.popitem(last=False)[0]

    def drop(self, item: Range, *, is_elsewhere: bool) -> None:
        """Let a range go: there is nothing left of it to fetch, but what other processes may be fetching."""
        self._waiting.pop(item, None)
        if is_elsewhere:
            self._elsewhere[item] = None

    def look_again(self) -> None:
        """Queue once more what other processes were fetching: one that was killed has not."""
        self._waiting.update(self._elsewhere)
        self._elsewhere.clear()

    def clear(self) -> None:
        """Nothing is to be fetched."""
        self._waiting.clear()
        self._elsewhere.clear()
        self._of.clear()

    def around(self, path: str, start: int, end: int) -> tuple[int, int]:
        """Bytes [start, end), or the parts of `SMALLEST` bytes in which they lie of what was added of the file."""
        added = self._of.get(path, [])
        at = bisect.bisect_right(added, start, key=attrgetter("start")) - 1
        if at < 0 or end > added[at].end:
            return start, end
        _, first, last = added[at]
        before, after = (start - first) // SMALLEST, -(-(end - first) // SMALLEST)
        return first + before * SMALLEST, min(first + after * SMALLEST, last)
