"""A check that local paths are regular files: reading a device or a pipe may never end."""

from __future__ import annotations

import stat
from pathlib import Path

from storage_schemas.errors import CorruptShard


def refuse_devices(path: str) -> None:
    """Accept a local file or folder, or a missing path.

    Raises:
        CorruptShard: the path is a device or a pipe, for example through a link in the artifact.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return  # the read raises a better error
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptShard(f"{path}: expected a file, found a device or a pipe")
