"""Folder of the user's cache."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The cache folder `name`, which need not exist; None if the user has no home directory.

    It is in $DATAMERGE_CACHE, else in $XDG_CACHE_HOME/datamerge, else in ~/.cache/datamerge (on macOS in
    ~/Library/Caches/datamerge).
    """
    chosen, shared = os.environ.get("DATAMERGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    try:
        base = Path(chosen).expanduser() if chosen else Path(shared or usual).expanduser() / "datamerge"
    except RuntimeError:
        return None
    return base.absolute() / name
