"""A thread-safe cache that computes each value once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from storage_schemas.access.lru import Lru
from storage_schemas.access.threads import result_of

K = TypeVar("K")
V = TypeVar("V")


class Once(Generic[K, V]):
    """The `size` most recently used values, by key; one thread computes a value while others wait for it.

    Errors are not cached: all waiting threads get the error, and a later call tries again.
    """

    def __init__(self, size: int) -> None:
        self._values, self._lock = Lru[K, V](size), threading.Lock()
        self._made: dict[K, Future[V]] = {}

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return self._values.get(key) is not None

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key, computed by `make` if it is not cached."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                return value
            made, is_mine = self._made.get(key), False
            if made is None:
                made, is_mine = self._made.setdefault(key, Future()), True
        if is_mine:
            try:
                made.set_result(make())
            except BaseException as error:  # or other threads would wait for ever
                made.set_exception(error)
            with self._lock:
                del self._made[key]
                if made.exception() is None:
                    self._values.put(key, made.result())
        return result_of(made)
