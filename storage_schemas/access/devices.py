"""Local paths that are no files: reading a device or a pipe need not end."""

from __future__ import annotations

import stat
from pathlib import Path

from storage_schemas.errors import CorruptShard


def refuse_devices(path: str) -> None:
    """Do nothing for a local file or folder, or where there is none.

    Raises:
        CorruptShard: a device or a pipe, to which a file of an artifact may link.
    """
    try:
        mode = Path(path).stat().st_mode
    except OSError:
        return  # the read says it better
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise CorruptShard(f"{path}: expected a file, found a device or a pipe")
