"""Threads that make many requests at a time; those that a caller waits for come first.

Threads start when there is work and end when there is none, or with their owner or the interpreter. One request is
always kept free for waiting callers. After a failed prefetch there is a pause without prefetching, which doubles with
each failure: an overloaded server then gets only the requests that somebody waits for. A caller that has waited for a
minute emits a warning.
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
Job = tuple[str, Callable[[], None]]  # kind of work, and the work itself

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
SILENT_SECONDS = 60.0  # of waiting between two warnings
WAITED_FOR = "waited for"  # kind of work that a caller waits for


class RequestThreads(ABC):
    """Makes requests in threads; subclasses choose what to prefetch."""

    def __init__(self, url: str, requests: int) -> None:
        """Create one without threads.

        Args:
            url: of the server, without secrets, for messages.
            requests: largest number of requests at a time.
        """
        self._url, self._requests = url, requests
        self._changed = threading.Condition()  # guards all queues and counters
        self._calls: deque[Call] = deque()
        self._active: Counter[str] = Counter()
        self._pause, self._pause_until = 0.0, 0.0
        self._closed = False
        self._abandoned = 0  # number of calls of `abandon`
        _ALL.add(self)

    @abstractmethod
    def _next_ahead(self, most: int) -> Job | None:
        """The next prefetch, if one is due; at most `most` run at a time. The caller holds `_changed`."""

    def close(self) -> None:
        """Stop prefetching, and return when no request is in flight."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while self._active.total():
                self._changed.wait(1.0)

    def abandon(self) -> None:
        """End all current waits with a DatamergeError: their results are no longer needed."""
        with self._changed:
            self._abandoned += 1
            self._changed.notify_all()

    def _patience(self, path: str) -> Patience:
        began = self._abandoned
        return Patience(self._where(path), lambda: self._abandoned > began)

    def _where(self, path: str) -> str:
        return f"{self._url}/{path}"

    def _wait_for(self, path: str, work: Callable[[], T]) -> T:
        """The result of some work, which a thread does before all other work."""
        call = Call(work)
        patience = self._patience(path)
        with self._changed:
            self._calls.append(call)
            self._start_threads()
            while not call.is_done:
                patience.wait(self._changed)
        return cast(T, call.outcome())

    def _start_threads(self) -> None:
        """Start a thread for each job that is due; the caller holds `_changed`."""
        while (job := self._next()) is not None:
            threading.Thread(target=_work, args=(weakref.ref(self), job), name="fetch", daemon=True).start()

    def _next(self) -> Job | None:
        """The next job, if one is due and a request is free for it; the caller holds `_changed`."""
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
        """Do some work, and return this thread's next job."""
        failed = False
        try:
            work()
        except Exception:  # a later read repeats the request and raises its error
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
    """Work that a caller waits for, and its result or error."""

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
        """The result of the work; raises its error."""
        if self._error is not None:
            raise self._error
        return self._result


class Patience:
    """The clock of one wait, which may consist of several calls of `wait`."""

    def __init__(self, where: str, is_abandoned: Callable[[], bool]) -> None:
        """Start the clock.

        Args:
            where: URL of the file, without secrets, for messages.
            is_abandoned: whether the file is no longer needed.
        """
        self._where, self._is_abandoned = where, is_abandoned
        self._began = time.monotonic()
        self._minutes = 0

    def wait(self, changed: threading.Condition, seconds: float = 1.0) -> None:
        """Wait for a notification, at most `seconds`; the caller holds `changed`.

        Raises:
            DatamergeError: the wait was abandoned.
        """
        changed.wait(seconds)
        if self._is_abandoned():
            raise DatamergeError(f"{self._where}: the read was abandoned, because its reader has stopped")
        waited = time.monotonic() - self._began
        if waited >= SILENT_SECONDS * (self._minutes + 1):
            self._minutes = int(waited // SILENT_SECONDS)
            warnings.warn(
                f"{self._where}: nothing has come for {waited:.0f} seconds; still waiting",
                RuntimeWarning,
                stacklevel=5,
            )


def _work(owner: weakref.ref[RequestThreads], job: Job | None) -> None:
    """Body of a thread: work until there is no job, or until the owner is garbage-collected."""
    while job is not None and (threads := owner()) is not None:
        job = threads._do(*job)
        del threads


_ALL: weakref.WeakSet[RequestThreads] = weakref.WeakSet()


def _stop() -> None:
    """Start no prefetch while the interpreter exits."""
    for threads in list(_ALL):
        threads._closed = True


atexit.register(_stop)
os.register_at_fork(after_in_child=_ALL.clear)
