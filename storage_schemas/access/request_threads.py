"""Threads that make requests: many at a time, what somebody waits for first.

Threads begin with the work and end with it, with their owner, or with the interpreter. One request is always kept
free for somebody who waits. Once something that nobody waits for has failed, nothing is fetched ahead for a while,
which doubles with each failure: a server in trouble is asked by those alone who need the answer. Who waits for a
minute says so.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from typing import Any, TypeVar, cast

from storage_schemas.errors import DatamergeError

T = TypeVar("T")
Job = tuple[str, Callable[[], None]]  # of what kind, and the work

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
SILENT_SECONDS = 60.0  # that somebody waits before that is said
WAITED_FOR = "waited for"  # kind of the work that somebody waits for


class RequestThreads(ABC):
    """Makes requests in threads; what to fetch ahead is said by a class below."""

    def __init__(self, url: str, requests: int) -> None:
        """Make one that has no threads yet.

        Args:
            url: where to, as it may be shown.
            requests: at a time.
        """
        self._url, self._requests = url, requests
        self._changed = threading.Condition()  # guards all that is queued
        self._calls: deque[Call] = deque()
        self._active: Counter[str] = Counter()
        self._pause, self._pause_until = 0.0, 0.0
        self._closed = False
        self._abandoned = 0  # how often
        _ALL.add(self)

    @abstractmethod
    def _next_ahead(self, most: int) -> Job | None:
        """Work that nobody waits for, of which `most` is done at a time; the caller holds `_changed`."""

    def close(self) -> None:
        """Fetch nothing ahead any more; returns when no request is on its way."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._active.total():
                self._changed.wait(1.0)

    def abandon(self) -> None:
        """Let those go who wait now, with an error: what they wait for is of no use any more."""
        with self._changed:
            self._abandoned += 1
            self._changed.notify_all()

    def _patience(self, path: str) -> Patience:
        began = self._abandoned
        return Patience(self._where(path), lambda: self._abandoned > began)

    def _where(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _wait_for(self, path: str, work: Callable[[], T]) -> T:
        """The result of some work, which a thread does ahead of everything else."""
        call = Call(work)
        patience = self._patience(path)
        with self._changed:
            self._calls.append(call)
            self._start_threads()
            while not call.is_done:
                patience.wait(self._changed)
        return cast(T, call.outcome())

    def _start_threads(self) -> None:
        """Start as many as there is work for; the caller holds `_changed`."""
        while (job := self._next()) is not None:
            threading.Thread(target=_work, args=(weakref.ref(self), job), name="fetch", daemon=True).start()

    def _next(self) -> Job | None:
        """The work that is due, if a request is free for it."""
        if self._active.total() >= self._requests:
            return None
        most = max(1, self._requests - 1)
        job: Job | None = None
        if self._calls:
            job = WAITED_FOR, self._calls.popleft().run
        elif (
            not self._closed
            and time.monotonic() >= self._pause_until
            and self._active.total() - self._active[WAITED_FOR] < most
        ):
            job = self._next_ahead(most)
        if job is not None:
            self._active[job[0]] += 1
        return job

    def _do(self, kind: str, work: Callable[[], None]) -> Job | None:
        """Do some work; what is due next, for this thread."""
        failed = False
        try:
            work()
        except Exception:  # who reads it is told
            failed = True
        with self._changed:
            if not failed:
                self._pause = 0.0
            elif time.monotonic() >= self._pause_until:
                self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
                self._pause_until = time.monotonic() + self._pause
            self._active[kind] -= 1
            self._changed.notify_all()
            due = self._next()
            self._start_threads()
            return due


class Call:
    """Work that somebody waits for, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.is_done = False
        self._result: Any = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the work; raises nothing."""
        try:
            self._result = self._work()
        except BaseException as error:
            self._error = error
        self.is_done = True

    def outcome(self) -> Any:
        """What the work gave; raises what it raised."""
        if self._error is not None:
            raise self._error
        return self._result


class Patience:
    """One wait, in any number of pieces."""

    def __init__(self, where: str, is_abandoned: Callable[[], bool]) -> None:
        """Begin to wait.

        Args:
            where: the URL of the file that is waited for, as it may be shown.
            is_abandoned: whether nobody wants it any more.
        """
        self._where, self._is_abandoned = where, is_abandoned
        self._began = time.monotonic()
        self._minutes = 0

    def wait(self, changed: threading.Condition, seconds: float = 1.0) -> None:
        """Wait for a notification, at most so long; the caller holds `changed`.

        Raises:
            DatamergeError: nobody wants it any more.
        """
        changed.wait(seconds)
        if self._is_abandoned():
            raise DatamergeError(f"{self._where}: no longer waited for")
        waited = time.monotonic() - self._began
        if waited >= SILENT_SECONDS * (self._minutes + 1):
            self._minutes = int(waited // SILENT_SECONDS)
            warnings.warn(
                f"{self._where}: nothing has come for {waited:.0f} seconds; still waiting",
                RuntimeWarning,
                stacklevel=5,
            )


def _work(owner: weakref.ref[RequestThreads], job: Job | None) -> None:
    """What a thread does: work until there is none, or until nobody has the owner any more."""
    while job is not None and (threads := owner()) is not None:
        job = threads._do(*job)
        del threads


_ALL: weakref.WeakSet[RequestThreads] = weakref.WeakSet()


def _stop() -> None:
    """Begin no request while the interpreter ends."""
    for threads in list(_ALL):
        threads._closed = True


atexit.register(_stop)
os.register_at_fork(after_in_child=_ALL.clear)
