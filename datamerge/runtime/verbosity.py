"""How much is said on stderr while the work goes on: `datamerge --quiet`, or DATAMERGE_QUIET=1 for the Python API.

An environment variable, so that the processes that a command starts keep quiet too. Warnings and errors are not
progress: they are always shown.
"""

from __future__ import annotations

import os

QUIET = "DATAMERGE_QUIET"


def quiet() -> bool:
    """Whether progress and hints are to be left out."""
    return os.environ.get(QUIET, "0") not in ("", "0")
