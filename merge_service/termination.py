"""SIGTERM, which schedulers send before they kill, as an exception: the merge ends in order, as after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Raise `Terminated` on SIGTERM in here. Enter it once Ray runs, whose own handler aborts with a stack trace."""
    # Only the main thread may set handlers; elsewhere signals are somebody else's business.
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
