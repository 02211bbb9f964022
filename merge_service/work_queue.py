"""Which piece of work comes next, and what happens to one whose worker died: a state machine without Ray.

A worker holds several pieces at a time, so its death has several suspects. A suspect is tried again alone on a
worker, where its next failure is its own. After `tries` failures, or one that would come again, its shard is set
aside and the rest goes on. A node that disappears blames nobody: its pieces go back to the front of the queue.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit that a worker carries out.

    Attributes:
        shard: the shard it belongs to.
        part: which part of the shard's samples; None for a whole shard, or for its completion.
        completes: whether this puts the parts of a shard together.
    """

    shard: int
    part: int | None = None
    completes: bool = False


@dataclass(frozen=True, slots=True)
class SetAside:
    """A shard that was given up, after how many tries, and the last reason."""

    shard: int
    tries: int
    reason: str


class WorkQueue:
    """Pieces that wait, pieces under suspicion, and shards set aside.

    Args:
        pieces: in the order of work; may be an iterator that makes them when they are needed.
        tries: failures after which a shard is set aside.
    """

    def __init__(self, pieces: Iterable[Piece], tries: int) -> None:
        self._fresh = iter(pieces)
        self._returned: deque[Piece] = deque()
        self._suspects: deque[Piece] = deque()
        self._tries = tries
        self._failures: Counter[Piece] = Counter()
        self._set_aside: set[int] = set()

    def take(self, load: int, capacity: int, alone: bool) -> Piece | None:
        """The next piece for a worker that has `load` of `capacity` pieces; None if it should get none now.

        Args:
            load: pieces the worker holds.
            capacity: pieces it may hold.
            alone: whether one of them is a suspect, which must not have company.
        """
        if alone or load >= capacity:
            return None
        if load == 0 and (suspect := self._next(self._suspects)) is not None:
            return suspect
        if (returned := self._next(self._returned)) is not None:
            return returned
        return next((piece for piece in self._fresh if piece.shard not in self._set_aside), None)

    def is_suspect(self, piece: Piece) -> bool:
        """Whether the piece has failed before."""
        return self._failures[piece] > 0

    def add(self, piece: Piece) -> None:
        """Put a piece at the front; a suspect stays one."""
        (self._suspects if self.is_suspect(piece) else self._returned).appendleft(piece)

    def succeeded(self, piece: Piece) -> None:
        """Forget what the piece was suspected of."""
        self._failures.pop(piece, None)

    def failed(self, pieces: Iterable[Piece], reason: str, lasting: bool = False) -> list[SetAside]:
        """One failure with one cause among these pieces; returns the shards that are given up.

        Args:
            pieces: that were under way.
            reason: of the failure.
            lasting: whether another try would fail in the same way.
        """
        given_up = []
        for piece in pieces:
            self._failures[piece] += 1
            if piece.shard in self._set_aside:
                continue
            if lasting or self._failures[piece] >= self._tries:
                self._set_aside.add(piece.shard)
                given_up.append(SetAside(piece.shard, self._failures[piece], reason))
            else:
                self._suspects.append(piece)
        return given_up

    def gives_up(self, shard: int) -> bool:
        """Whether the shard has been set aside."""
        return shard in self._set_aside

    def _next(self, pieces: deque[Piece]) -> Piece | None:
        while pieces:
            piece = pieces.popleft()
            if piece.shard not in self._set_aside:
                return piece
        return None
