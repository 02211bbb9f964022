"""Values that several threads want: each is made once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

from storage_schemas.access.lru import Lru

K = TypeVar("K")
V = TypeVar("V")


class Once(Generic[K, V]):
    """The `size` values that were used last, by key; one thread makes a value, others wait for it.

    What fails is not kept: all that wait get the error, whoever asks later tries again.
    """

    def __init__(self, size: int) -> None:
        self._values, self._lock = Lru[K, V](size), threading.Lock()
        self._made: dict[K, Future[V]] = {}

    def __contains__(self, key: K) -> bool:
        with self._lock:
            return self._values.get(key) is not None

    def get(self, key: K, make: Callable[[], V]) -> V:
        """The value of a key; `make` is called if there is none."""
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
            except BaseException as error:  # whoever waits must not wait for ever
                made.set_exception(error)
            with self._lock:
                del self._made[key]
                if made.exception() is None:
                    self._values.put(key, made.result())
        return made.result()
