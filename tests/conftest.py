"""What holds for all tests."""

from __future__ import annotations

import atexit
import os
import signal
import sys

from datamerge.runtime.ray import leave, ray_environment

_status: list[int] = []


def pytest_configure() -> None:
    """Ctrl-C works in here and in the processes that tests start, also where a shell started us in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(ray_environment())


def pytest_sessionfinish(exitstatus: int) -> None:
    _status.append(int(exitstatus))


@atexit.register  # so early that it runs after what Ray and others register
def _end() -> None:
    """What the command does about Ray when it ends, for the process of the tests."""
    # Whatever failed after the session has left its traceback here, and has an exit status of its own.
    if "ray" in sys.modules and _status and not hasattr(sys, "last_value"):
        leave(_status[0])
