"""The queue of work, without Ray: which piece comes next, and which piece to blame for a worker's death.

A worker holds several pieces at a time, so its death has several suspects. A suspect is retried alone on a worker,
where its next failure has no other cause. After `tries` failures, or one that a retry would repeat, its shard is
given up and the others go on. If a node disappears, its pieces return to the front of the queue without blame.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit of work.

    Attributes:
        shard: the shard it belongs to.
        part: index of the part of the shard's samples; None for a whole shard, or for its completion.
        completes: whether the piece combines the parts of its shard.
    """

    shard: int
    part: int | None = None
    completes: bool = False


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A shard that was given up, with the number of tries and the last reason."""

    shard: int
    tries: int
    reason: str


class WorkQueue:
    """Waiting pieces, suspects, and shards that were given up.

    Args:
        pieces: pieces in the order of work; may be a lazy iterator.
        tries: number of failures after which a shard is given up.
    """

    def __init__(self, pieces: Iterable[Piece], tries: int) -> None:
        self._fresh = iter(pieces)
        self._returned: deque[Piece] = deque()
        self._suspects: deque[Piece] = deque()
        self._tries = tries
        self._failures: Counter[Piece] = Counter()
        self._given_up: set[int] = set()

    def take(self, load: int, capacity: int, alone: bool) -> Piece | None:
        """The next piece for a worker that has `load` of `capacity` pieces; None if it should get none now.

        Args:
            load: pieces the worker holds.
            capacity: pieces it may hold.
            alone: whether it holds a suspect, which must run alone.
        """
        if alone or load >= capacity:
            return None
        if load == 0 and (suspect := self._next(self._suspects)) is not None:
            return suspect
        if (returned := self._next(self._returned)) is not None:
            return returned
        return next((piece for piece in self._fresh if piece.shard not in self._given_up), None)

    def is_suspect(self, piece: Piece) -> bool:
        """Whether the piece has failed before."""
        return self._failures[piece] > 0

    def add(self, piece: Piece) -> None:
        """Put a piece back at the front; a suspect stays a suspect."""
        (self._suspects if self.is_suspect(piece) else self._returned).appendleft(piece)

    def succeeded(self, piece: Piece) -> None:
        """Forget the failures of a piece."""
        self._failures.pop(piece, None)

    def failed(self, pieces: Iterable[Piece], reason: str, lasting: bool = False) -> list[GivenUp]:
        """Record one failure that one of these pieces caused; returns the shards that are given up.

        Args:
            pieces: pieces that the worker was running.
            reason: reason of the failure.
            lasting: whether a retry would fail in the same way.
        """
        given_up = []
        for piece in pieces:
            self._failures[piece] += 1
            if piece.shard in self._given_up:
                continue
            if lasting or self._failures[piece] >= self._tries:
                self._given_up.add(piece.shard)
                given_up.append(GivenUp(piece.shard, self._failures[piece], reason))
            else:
                self._suspects.append(piece)
        return given_up

    def gives_up(self, shard: int) -> bool:
        """Whether the shard has been given up."""
        return shard in self._given_up

    def _next(self, pieces: deque[Piece]) -> Piece | None:
        while pieces:
            piece = pieces.popleft()
            if piece.shard not in self._given_up:
                return piece
        return None
