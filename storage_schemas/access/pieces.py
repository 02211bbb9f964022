"""Prefetched ranges in memory, each kept until it has been read as often as it was announced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from storage_schemas.access.block_file import Bytes


class Range(NamedTuple):
    """Bytes [start, end) of a file; `path` is relative to the location."""

    path: str
    start: int
    end: int


class Pieces:
    """Ranges in flight or in memory. Not thread-safe: the owner's lock guards it.

    Attributes:
        flying: bytes in flight.
        held: bytes in flight and in memory.
    """

    def __init__(self, most: int) -> None:
        """Create an empty one.

        Args:
            most: limit of `held` in bytes.
        """
        self._most = most
        self._due: Counter[Range] = Counter()  # how often each range will still be read
        self._flying: dict[Range, bool] = {}  # in flight → whether to memory, not to the disk
        self._here: dict[Range, Bytes] = {}
        self.flying = self.held = 0

    def expect(self, item: Range) -> bool:
        """Announce one more read of a range; True if it has to be fetched for it."""
        self._due[item] += 1
        return item not in self._flying and item not in self._here

    def is_due(self, item: Range) -> bool:
        """Whether a range will still be read."""
        return item in self._due

    @property
    def are_due(self) -> bool:
        """Whether any range will still be read."""
        return bool(self._due)

    def has_room(self, items: Sequence[Range]) -> bool:
        """Whether these ranges fit the limit; ranges of any size do if nothing else is held."""
        return not self.held or self.held + _bytes(items) <= self._most

    def begin(self, items: Sequence[Range], to_memory: bool) -> None:
        """Record that ranges are in flight."""
        self._flying.update(dict.fromkeys(items, to_memory))
        self.flying += _bytes(items)
        self.held += _bytes(items)

    def turn(self, items: Sequence[Range]) -> None:
        """Record that ranges in flight go to memory instead of to the disk."""
        self._flying.update(dict.fromkeys(items, True))

    def end(self, items: Sequence[Range]) -> None:
        """Record that ranges are no longer in flight."""
        for item in items:
            self._flying.pop(item, None)
        self.flying -= _bytes(items)
        self.held -= _bytes(items)

    def is_flying(self, item: Range) -> bool:
        """Whether a range is in flight, to memory or to the disk."""
        return item in self._flying

    def has(self, item: Range) -> bool:
        """Whether a range is in memory, or on its way there."""
        return item in self._here or self._flying.get(item, False)

    def get(self, item: Range) -> Bytes | None:
        """A range that is in memory."""
        return self._here.get(item)

    def keep(self, item: Range, piece: Bytes) -> None:
        """Hold the bytes of a range if it will be read."""
        if item in self._due and item not in self._here:
            self._here[item] = piece
            self.held += len(piece)

    def leave(self, item: Range) -> bool:
        """Record one read of a range; drop it unless it is due again and memory is at most half full.

        Returns:
            Whether it has to be fetched once more.
        """
        if item not in self._due:
            return False
        self._due[item] -= 1
        is_due = self._due[item] > 0
        if not is_due:
            del self._due[item]
        if not is_due or self.held > self._most // 2:  # leave the memory to ranges that are read sooner
            self._drop(item)
        return is_due and item not in self._flying and item not in self._here

    def make_room(self) -> None:
        """Drop held ranges, oldest first, if they fill more than half of the memory while nothing is in flight."""
        while self._here and not self._flying and self.held > self._most // 2:
            self._drop(next(iter(self._here)))

    def forget(self, path: str) -> None:
        """Drop the held ranges of a file."""
        for item in [item for item in self._here if item.path == path]:
            self._drop(item)

    def clear(self) -> None:
        """Drop all held ranges and announcements."""
        self._due.clear()
        for item in list(self._here):
            self._drop(item)

    def _drop(self, item: Range) -> None:
        self.held -= len(self._here.pop(item, ()))


def _bytes(items: Sequence[Range]) -> int:
    return sum(item.end - item.start for item in items)
