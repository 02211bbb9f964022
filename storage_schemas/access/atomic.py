"""Atomic writes of local files, and disk errors that name the file being written."""

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
# Messages of libraries that hide the system's error: safetensors and torch's archives.
_IN_WORDS = re.compile(
    r"No space left on device|File too large|[Qq]uota exceeded|Input/output error|unexpected pos|file write failed"
)


class _Raw(io.FileIO):
    """A file that remembers why a write failed, because some writers replace the error by one of their own.

    Attributes:
        failure: error of the first write that failed.
    """

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failure = self.failure or error
            raise


SHOWN_NAME = 40  # letters of a file's name that the name of its temporary file repeats


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose bytes appear under `path` when the block ends without an error.

    Creates the parent folder. After an error the temporary file is removed and an older file is unchanged.

    Raises:
        IsADirectoryError: `path` is a folder.
        OSError: the disk is full or the write fails for another reason; `filename` is `path`.
    """
    if path.is_dir():  # the rename would fail too, but its error would name the temporary file
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `mkstemp`, which ignores the umask: only the owner could read the file. The name is cut because `path` may
    # already have the longest name that the file system allows.
    temporary = path.with_name(f".{path.name[:SHOWN_NAME]}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise _with_path(error, path) from error
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
            raise _with_path(raw.failure, path) from error
        if isinstance(error, OSError) and error.filename in (None, str(temporary)):
            raise _with_path(error, path) from error
        raise
    # Sync the rename as well: otherwise a power cut could leave a sidecar without its shard.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn disk errors of other libraries that write to `path`, or below it, into an error that names `path`.

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


def _with_path(error: OSError, path: Path) -> OSError:
    """The same error with this path; unchanged if it has no errno, that is, if no system call raised it."""
    return error if error.errno is None else OSError(error.errno, os.strerror(error.errno), str(path))


def _reason(error: BaseException) -> str | None:
    """Why the disk refused a write, searched along the chain of causes; None if no disk error is in it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return os.strerror(cause.errno or 0)
        if found := _IN_WORDS.search(str(cause)):
            known = found[0] not in ("unexpected pos", "file write failed")
            return found[0] if known else "the file was written only in part, the disk may be full"
        cause = cause.__cause__ or cause.__context__
    return None
