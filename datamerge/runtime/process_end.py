"""The end of a process in which native libraries have threads of their own."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Exit as `sys.exit` does, but without the destructors of native libraries.

    Threads of Ray (2.60) and of torch's process groups (2.13) outlive their shutdown and use what the destructors
    free: a process whose work is done could still end with a segmentation fault or an abort.
    """
    # Private, and without a public way: a registered handler that ends the process comes before all that were
    # registered earlier, and those would never run.
    atexit._run_exitfuncs()
    leave(code)


def leave(code: int) -> NoReturn:
    """Flush the standard streams and exit at once; the last step of `end_process`."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 1
    os._exit(code)
