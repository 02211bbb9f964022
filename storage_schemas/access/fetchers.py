"""The fetcher of a location, which all its readers in a process share."""

from __future__ import annotations

import os
import threading

from storage_schemas.access.fetching import Fetcher
from storage_schemas.access.location import Location

_MAKING = threading.Lock()


def fetcher_of(location: Location) -> Fetcher:
    """The fetcher of a remote location, in this process."""
    with _MAKING:
        made: tuple[int, Fetcher] | None = vars(location).get("_fetcher")
        if made is None or made[0] != os.getpid():
            made = os.getpid(), Fetcher(location, getattr(location, "cache", None))
            vars(location)["_fetcher"] = made
        return made[1]


def _after_fork() -> None:
    global _MAKING
    _MAKING = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
