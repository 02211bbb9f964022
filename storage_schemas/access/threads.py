"""An ordered `map` over a thread pool, for requests to storage."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

# Calls per thread that may be started or done before their results are taken. Bounded: there may be 200,000 shards.
AHEAD = 2
# Seconds of the longest wait at a time. Python handles signals in the main thread, which a signal does not wake if it
# arrives just before the wait.
LONGEST_WAIT = 0.5


@contextmanager
def in_threads(threads: int, work: Callable[..., T], *columns: Iterable[object]) -> Iterator[Iterator[T]]:
    """Ordered `map(work, *columns)` on a thread pool, up to `AHEAD` calls per thread ahead of the results taken.

    When the block ends, calls that have not started are cancelled.
    """
    pool = ThreadPoolExecutor(threads)

    def results() -> Iterator[T]:
        waiting: deque[Future[T]] = deque()
        for arguments in zip(*columns, strict=False):
            waiting.append(pool.submit(work, *arguments))
            if len(waiting) > AHEAD * threads:
                yield result_of(waiting.popleft())
        while waiting:
            yield result_of(waiting.popleft())

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for thousands of calls


def result_of(future: Future[T]) -> T:
    """The result of a future, as `Future.result`; signals that arrive during the wait are handled soon after."""
    while not future.done():
        wait([future], LONGEST_WAIT)
    return future.result()
