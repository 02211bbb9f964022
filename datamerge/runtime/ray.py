"""Ray as a guest in a process of ours: what it reads when it is imported, and an end of the process without it."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def ray_environment() -> dict[str, str]:
    """What Ray reads from the environment when it is imported, without what the caller's says already."""
    settings = {
        # No reports to its makers.
        "RAY_USAGE_STATS_ENABLED": "0",
        # No metrics of a driver: ray.init() starts a thread for them that ray.shutdown() leaves running (Ray 2.60).
        "RAY_enable_open_telemetry": "0",
    }
    return {name: value for name, value in settings.items() if name not in os.environ}


def end_process(code: int) -> NoReturn:
    """As `sys.exit` in a process that used Ray, but without the destructors of native libraries.

    Threads of Ray's live on after `ray.shutdown()` and use what the destructors take away, so that a process with all
    of its work done can still end with a segmentation fault (Ray 2.60).
    """
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """The last thing that `end_process` does: flush, and be gone."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)
