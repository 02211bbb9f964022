"""Requests that wait for storage, several at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def in_threads(threads: int, work: Callable[..., T], *columns: Iterable[object]) -> Iterator[Iterator[T]]:
    """`map(work, *columns)`, in that order, with calls in so many threads; ends without those not yet begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        yield pool.map(work, *columns)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt must not wait for thousands of calls
