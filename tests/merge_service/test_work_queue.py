"""The queue without Ray: every shard is done once or given up, and suspects are retried alone."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from merge_service.work_queue import Piece, WorkQueue

TRIES, CAPACITY = 3, 2


@given(
    st.integers(1, 30),
    st.integers(1, 4),
    st.sets(st.integers(0, 29), max_size=4),
    st.integers(0, 2**32),
)
def test_every_shard_is_done_once_or_given_up(pieces: int, workers: int, poison: set[int], seed: int) -> None:
    """Simulated workers die of poisoned pieces, with all pieces that they hold, and nodes are lost at random."""
    generator = random.Random(seed)
    queue = WorkQueue((Piece(shard) for shard in range(pieces)), TRIES)
    held: list[list[Piece]] = [[] for _ in range(workers)]
    done: list[int] = []
    given_up: list[int] = []
    deaths = 0
    for _ in range(10_000):
        for worker in held:
            while True:
                alone = any(queue.is_suspect(piece) for piece in worker)
                piece = queue.take(len(worker), CAPACITY, alone)
                if piece is None:
                    break
                worker.append(piece)
            assert len(worker) <= CAPACITY
            assert len(worker) == 1 or not any(queue.is_suspect(piece) for piece in worker)
        busy = [worker for worker in held if worker]
        if not busy:
            break
        worker = generator.choice(busy)
        if generator.random() < 0.05:  # the node is lost
            for piece in reversed(worker):
                queue.add(piece)
            worker.clear()
        elif any(piece.shard in poison for piece in worker):
            deaths += 1
            given_up += [one.shard for one in queue.failed(worker, "died")]
            worker.clear()
        else:
            piece = worker.pop(generator.randrange(len(worker)))
            queue.succeeded(piece)
            done.append(piece.shard)
    assert sorted(given_up) == sorted(poison & set(range(pieces)))
    assert sorted(done) == sorted(set(range(pieces)) - poison)
    assert deaths <= TRIES * len(poison)


def test_a_shard_that_was_given_up_gives_no_more_parts() -> None:
    queue = WorkQueue((Piece(0, part) for part in range(5)), TRIES)
    for _ in range(TRIES):
        piece = queue.take(0, CAPACITY, False)
        assert piece == Piece(0, 0)
        given_up = queue.failed([piece], "broken")
    assert [(one.shard, one.tries, one.reason) for one in given_up] == [(0, TRIES, "broken")]
    assert queue.gives_up(0)
    assert queue.take(0, CAPACITY, False) is None


def test_success_clears_a_suspect() -> None:
    queue = WorkQueue([Piece(0)], TRIES)
    for _ in range(5):
        piece = queue.take(0, CAPACITY, False)
        assert piece is not None
        assert queue.failed([piece], "died") == []
        assert queue.is_suspect(piece)
        assert queue.take(1, CAPACITY, False) is None  # not beside another piece
        assert queue.take(0, CAPACITY, False) == piece
        queue.succeeded(piece)
        assert not queue.is_suspect(piece)
        queue.add(piece)
