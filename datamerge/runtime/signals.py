"""SIGINT and SIGTERM: recorded, so that work ends in order, or raised as an exception.

Only the main thread can set signal handlers; in other threads these context managers do nothing.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 1.0  # seconds that `StopSignals.waiting` goes on after a signal


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which schedulers send before they kill a process."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Inside, SIGTERM raises `Terminated`. Enter it after Ray has started, to replace its handler, which aborts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        # If a handler raises inside a call of Ray, Ray raises a KeyboardInterrupt instead.
        if received:
            raise Terminated from None
        raise
    finally:
        # None stands for a handler that was not set from Python.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class WaitedInVain(KeyboardInterrupt):
    """A signal arrived, and the operation in `StopSignals.waiting` did not end soon after it."""


class StopSignals:
    """Records the first SIGINT or SIGTERM; a second one has its usual effect. A context manager.

    Attributes:
        received: number of the signal that arrived; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}
        self._alarm: Any = None
        self._is_waiting = False

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
            self._alarm = signal.signal(signal.SIGALRM, self._break_off)
        return self

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, a wait that goes on for `PATIENCE` seconds after a signal raises `WaitedInVain`."""
        self._is_waiting = True
        try:
            yield
        finally:
            self._is_waiting = False

    def _break_off(self, number: int, frame: FrameType | None) -> None:
        if self._is_waiting:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise WaitedInVain

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)
        # Not through sys.stderr, which is not reentrant: the signal may have interrupted a write to it.
        os.write(2, b"stopping after this step; once more to stop at once\n")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if self._alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm)
