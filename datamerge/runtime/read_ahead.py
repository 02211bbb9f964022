"""Makes the next item in a thread while the caller works on the current one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from storage_schemas.access.threads import result_of

T = TypeVar("T")


def read_ahead(items: Iterable[T], stop: Callable[[], None] = lambda: None) -> Iterator[T]:
    """Yield the same items in the same order; while one is in use, a thread makes the next.

    One thread makes all items, because readers keep open files and caches that are not thread-safe. Decoding,
    decompression and hashing release the GIL.

    Args:
        items: lazy items.
        stop: called if the caller stops early, to cut short the item that is being made.
    """
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        upcoming = pool.submit(next, iterator, end)
        try:
            while (item := result_of(upcoming)) is not end:
                upcoming = pool.submit(next, iterator, end)
                yield item  # type: ignore[misc]  # not `end`
        except BaseException:
            stop()
            raise
