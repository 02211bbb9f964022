"""How a run ends early. The first SIGINT or SIGTERM is noted, the second has its usual effect."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from storage_schemas import DatamergeError


class Stopped(DatamergeError):  # noqa: N818 - an outcome that was asked for, not an error
    """A signal ended the run early; its state is saved.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class NotFiniteRun(DatamergeError):  # noqa: N818 - says what was found
    """A loss or gradient was not finite; the run would come to it again."""


class StopSignals:
    """Notes the first SIGINT or SIGTERM instead of dying of it; a context manager.

    Attributes:
        received: number of the signal that arrived; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        # Only the main thread may set handlers; elsewhere signals are somebody else's business.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
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
