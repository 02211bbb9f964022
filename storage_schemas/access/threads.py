"""Requests that wait for storage, several at a time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# Calls that are begun or done and not taken yet, for each thread: a job of 200,000 shards has as many.
AHEAD = 2


@contextmanager
def in_threads(threads: int, work: Callable[..., T], *columns: Iterable[object]) -> Iterator[Iterator[T]]:
    """`map(work, *columns)`, in that order, with calls in so many threads, a few of them ahead of what is taken.

    Ends without the calls that have not begun.
    """
    pool = ThreadPoolExecutor(threads)

    def results() -> Iterator[T]:
        waiting: deque[Future[T]] = deque()
        for arguments in zip(*columns, strict=False):
            waiting.append(pool.submit(work, *arguments))
            if len(waiting) > AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for thousands of calls
