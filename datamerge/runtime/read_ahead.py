"""The next item made in a thread while the caller works on this one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def read_ahead(items: Iterable[T], stop: Callable[[], None] = lambda: None) -> Iterator[T]:
    """The same items in the same order; while one is used, a thread makes the next.

    One thread makes them all: readers keep open files and caches that are not meant for several. Decoding,
    decompression and hashes release the GIL.

    Args:
        items: what to make.
        stop: called if the caller wants no more before the end, to shorten the item that is being made.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        upcoming = pool.submit(next, iterator, end)
        try:
            while (item := upcoming.result()) is not end:
                upcoming = pool.submit(next, iterator, end)
                yield item  # type: ignore[misc]  # not `end`
        except BaseException:
            stop()
            raise
