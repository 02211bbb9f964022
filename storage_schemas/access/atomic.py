"""Local files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

SHOWN_NAME = 40  # letters of a file's name in that of its temporary file


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write; its bytes are on the disk under `path` once the block ends without an error, not before.

    The parent folder is made. After an error nothing is left behind, and an older file stays as it was.

    Raises:
        IsADirectoryError: a folder is there.
    """
    if path.is_dir():  # the rename would fail too, and name the temporary file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `mkstemp`, whose files are for their owner alone: the umask decides. The name may be as long as any.
    temporary = path.with_name(f".{path.name[:SHOWN_NAME]}.{secrets.token_hex(6)}.tmp")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself must survive a power cut, or a sidecar could outlive its shard.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
