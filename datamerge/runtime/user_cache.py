"""Where this user's machine keeps what can be had again: $DATAMERGE_CACHE, $XDG_CACHE_HOME or ~/.cache."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache(name: str) -> Path | None:
    """The folder for copies of one kind, which need not exist: `name` in $DATAMERGE_CACHE, else in
    $XDG_CACHE_HOME/datamerge, else in ~/.cache/datamerge; None for somebody without a home.
    """
    own, shared = os.environ.get("DATAMERGE_CACHE"), os.environ.get("XDG_CACHE_HOME")
    try:
        base = Path(own).expanduser() if own else Path(shared or "~/.cache").expanduser() / "datamerge"
    except RuntimeError:
        return None
    return base.absolute() / name
