"""Ends a process in which native libraries have left threads running."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Exit like `sys.exit`, but without running the destructors of native libraries.

    Threads of Ray (2.60) and of torch's process groups (2.13) outlive their shutdown and use memory that destructors
    free, so a process could end with a segmentation fault or an abort after its work is done.
    """
    # A private function, as there is no public one. A registered handler that ended the process would run before all
    # that were registered earlier, and those would never run.
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
