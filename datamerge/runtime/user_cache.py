"""Where this user's machine keeps what can be had again: where the user says, else where the system has it."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder for copies of one kind, which need not exist: `name` in $DATAMERGE_CACHE, else in
    $XDG_CACHE_HOME/datamerge, else in ~/.cache/datamerge, on macOS ~/Library/Caches/datamerge; None for somebody
    without a home.
    """
    own, shared = os.environ.get("DATAMERGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    try:
        base = Path(own).expanduser() if own else Path(shared or usual).expanduser() / "datamerge"
    except RuntimeError:
        return None
    return base.absolute() / name
