"""Ranges that were fetched ahead and wait in memory, each until it is read as often as it is expected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from storage_schemas.access.blocks import Bytes


class Range(NamedTuple):
    """Bytes [start, end) of a file, by its path in the location."""

    path: str
    start: int
    end: int


class Pieces:
    """What is on its way or waits in memory. Not safe for threads: its owner's lock guards it.

    Attributes:
        flying: bytes on their way.
        held: bytes of both.
    """

    def __init__(self, most: int) -> None:
        """Make one that holds nothing.

        Args:
            most: bytes on their way and in memory.
        """
        self._most = most
        self._due: Counter[Range] = Counter()  # how often a range will be read
        self._flying: dict[Range, bool] = {}  # whether to memory
        self._here: dict[Range, Bytes] = {}
        self.flying = self.held = 0

    def expect(self, item: Range) -> bool:
        """Note that a range will be read once more; whether it has to be fetched for that."""
        self._due[item] += 1
        return item not in self._flying and item not in self._here

    def is_due(self, item: Range) -> bool:
        """Whether a range is expected."""
        return item in self._due

    def has_room(self, items: Sequence[Range]) -> bool:
        """Whether these may be fetched; one of any size may if nothing else is there."""
        return not self.held or self.held + _bytes(items) <= self._most

    def begin(self, items: Sequence[Range], to_memory: bool) -> None:
        """Note that ranges are on their way."""
        self._flying.update(dict.fromkeys(items, to_memory))
        self.flying += _bytes(items)
        self.held += _bytes(items)

    def turn(self, items: Sequence[Range]) -> None:
        """Note that ranges on their way to the disk go to memory."""
        self._flying.update(dict.fromkeys(items, True))

    def end(self, items: Sequence[Range]) -> None:
        """Note that ranges are no longer on their way."""
        for item in items:
            self._flying.pop(item, None)
        self.flying -= _bytes(items)
        self.held -= _bytes(items)

    def is_flying(self, item: Range) -> bool:
        """Whether a range is on its way, to memory or to the disk."""
        return item in self._flying

    def has(self, item: Range) -> bool:
        """Whether a range is in memory, or on its way there."""
        return item in self._here or self._flying.get(item, False)

    def get(self, item: Range) -> Bytes | None:
        """A range that is in memory."""
        return self._here.get(item)

    def keep(self, item: Range, piece: Bytes) -> None:
        """Hold a range, if anybody will read it."""
        if item in self._due and item not in self._here:
            self._here[item] = piece
            self.held += len(piece)

    def leave(self, item: Range) -> bool:
        """Note that a range was read, and drop it unless it is due again; whether it has to be fetched for that."""
        if item not in self._due:
            return False
        self._due[item] -= 1
        is_due = self._due[item] > 0
        if not is_due:
            del self._due[item]
        if not is_due or self.held > self._most // 2:  # what is read sooner comes first
            self._drop(item)
        return is_due and item not in self._flying and item not in self._here

    def make_room(self) -> None:
        """Drop what nobody reads, so that it keeps out nothing that is read."""
        while self._here and not self._flying and self.held > self._most // 2:
            self._drop(next(iter(self._here)))

    def forget(self, path: str) -> None:
        """Drop what is there of a file."""
        for item in [item for item in self._here if item.path == path]:
            self._drop(item)

    def clear(self) -> None:
        """Nothing will be read."""
        self._due.clear()
        for item in list(self._here):
            self._drop(item)

    def _drop(self, item: Range) -> None:
        self.held -= len(self._here.pop(item, ()))


def _bytes(items: Sequence[Range]) -> int:
    return sum(item.end - item.start for item in items)
