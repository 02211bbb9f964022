"""Local files that appear whole or not at all, and failures of a disk with the path that they were about."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from storage_schemas.errors import DatamergeError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}
# What libraries make of it that do not pass the system's error on: safetensors, and torch's archives.
_IN_WORDS = re.compile(
    r"No space left on device|File too large|[Qq]uota exceeded|Input/output error|unexpected pos|file write failed"
)


class _Raw(io.FileIO):
    """A file that remembers why a write failed, for writers that make something else of it.

    Attributes:
        failure: of the first write that failed.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


SHOWN_NAME = 40  # letters of a file's name in that of its temporary file


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A stream to write; its bytes are on the disk under `path` once the block ends without an error, not before.

    The parent folder is made. After an error nothing is left behind, and an older file stays as it was.

    Raises:
        IsADirectoryError: a folder is there.
        OSError: the disk is full, or does not take it for another reason; with the path.
    """
    if path.is_dir():  # the rename would fail too, and name the temporary file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `mkstemp`, whose files are for their owner alone: the umask decides. The name may be as long as any.
    temporary = path.with_name(f".{path.name[:SHOWN_NAME]}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _of(error, path) from error
    raw = _Raw(descriptor, "wb")
    try:
        with io.BufferedWriter(raw) as stream:
            yield cast(BinaryIO, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if raw.failure is not None:
            raise _of(raw.failure, path) from error
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise _of(error, path) from error
        raise
    # The rename itself must survive a power cut, or a sidecar could outlive its shard.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say where, if a disk fails while other libraries write to `path`, or below it.

    Raises:
        DatamergeError: the disk is full, read-only or broken.
    """
    try:
        yield
    except DatamergeError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise DatamergeError(
            f"{path}: cannot write: {reason}; make room there, and run the same command again"
        ) from error


def _of(error: OSError, path: Path) -> OSError:
    """The same failure, about this path; errors that no system call made have no number, and stay as they are."""
    return error if error.errno is None else OSError(error.errno, os.strerror(error.errno), str(path))


def _reason(error: BaseException) -> str | None:
    """What a disk has against it, wherever it is said in a chain of errors; None for any other error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return os.strerror(cause.errno or 0)
        if found := _IN_WORDS.search(str(cause)):
            known = found[0] not in ("unexpected pos", "file write failed")
            return found[0] if known else "the disk did not take all of it, it may be full"
        cause = cause.__cause__ or cause.__context__
    return None
