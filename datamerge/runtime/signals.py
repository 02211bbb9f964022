"""SIGINT and SIGTERM: noted, so that work ends in order, or raised as an exception.

Only the main thread may set handlers; in other threads both do nothing, and signals are somebody else's business.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

PATIENCE = 1.0  # seconds after a signal, for something that is waited for


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived, which schedulers send before they kill."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM in here. Enter it once Ray runs, whose own handler aborts with a stack trace."""
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
        # Ray raises a KeyboardInterrupt of its own for whatever a handler raises inside its calls.
        if received:
            raise Terminated from None
        raise
    finally:
        # A handler that was not set from Python comes back as None.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class WaitedInVain(KeyboardInterrupt):
    """A signal arrived, and what was waited for has not come since."""


class StopSignals:
    """Notes the first SIGINT or SIGTERM; the second has its usual effect. A context manager.

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
        """Wait for something in here: some seconds after a signal that ends with `WaitedInVain`."""
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
        # Not through sys.stderr: the signal may have interrupted a write to it, which cannot be entered twice.
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
