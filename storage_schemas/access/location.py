"""A folder anywhere fsspec reaches, with whole-file atomic writes, retries, and errors that show no secret."""

from __future__ import annotations

import errno
import fnmatch
import glob
import io
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import fsspec

from storage_schemas.access.atomic import atomic_file
from storage_schemas.access.devices import refuse_devices
from storage_schemas.access.redaction import redact, split_query
from storage_schemas.access.retries import http_status, is_transient, retry
from storage_schemas.errors import DatamergeError, UserError

T = TypeVar("T")

# Protocol → extra of this package that installs its driver.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}

# Failures of this machine's disk while it takes a download.
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

WRITE_ATTEMPTS = 5
BLOCK = 5 * 2**20  # bytes that a stream over a network requests at least


class Location:
    """A root folder: a local path or any fsspec URL (``s3://``, ``gs://``, ``https://``, ``memory://``).

    Paths given to the methods are relative to the root and use ``/``. Transient failures of remote storage are
    retried. A query string, such as a signature, is kept and added to every path.

    Attributes:
        url: the URL as it may be shown and stored: passwords and query values are masked.
    """

    def __init__(self, url: str | os.PathLike[str], **storage_options: Any) -> None:
        self._url = os.fspath(url)
        self._options = storage_options
        base, self._query = split_query(self._url)
        self._base = base.rstrip("/") or "/"
        self.url = redact(self._base)
        self._connect()

    def _connect(self) -> None:
        options = dict(self._options)
        if "://" in self._base and "::" not in self._base:
            # Others write here too: a remembered listing would give sizes of files that were replaced since.
            options.setdefault("use_listings_cache", False)
        try:
            self._fs, self.root = fsspec.core.url_to_fs(self._base, **options)
        except ImportError as error:
            raise UserError(f"{self.url}: {_missing_driver(self._base, error)}") from None
        except ValueError as error:
            raise UserError(f"{self.url}: not a path or URL that fsspec knows ({redact(str(error))})") from None
        except Exception as error:  # drivers look for credentials, and those of archives for the archive
            raise _explained(error, self.url) from None
        self._process = os.getpid()

    @property
    def fs(self) -> Any:
        """The file system; connected again in a forked process, where the parent's connections are of no use."""
        if self._process != os.getpid():
            self._connect()
        return self._fs

    @property
    def is_local(self) -> bool:
        return "file" in self._fs.protocol or "local" in self._fs.protocol

    @property
    def is_read_only(self) -> bool:
        return "http" in self._fs.protocol

    def path(self, relative: str) -> str:
        """The full path of a file in this folder, as its file system spells it."""
        return (f"{self.root}/{relative}" if relative else str(self.root)) + self._query

    def local_path(self, relative: str) -> str | None:
        """A local file with the contents of `relative`, None where reading it means a request.

        Raises:
            FileNotFoundError: a location that keeps local copies, and no such file to copy.
        """
        return self.path(relative) if self.is_local else None

    def forget(self, relatives: Iterable[str]) -> bool:
        """Drop local copies of these files; whether there was any. A plain location has none."""
        return False

    def exists(self, relative: str = "") -> bool:
        if self.is_local:
            return bool(self.fs.exists(self.path(relative)))
        try:
            # Not `exists`, which takes a failing server for a missing file: a finished artifact would be begun anew.
            self._call(relative, lambda path: self.fs.info(path))
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether this location is one file; over http(s), where folders cannot be told from files, any is."""
        if self.is_local:
            return bool(self.fs.isfile(self.root))
        return bool(self._call("", lambda path: self.fs.info(path))["type"] == "file")

    def files(self) -> dict[str, Mapping[str, Any]]:
        """What the file system says of every file below this folder (`size`, `type`), by relative path."""
        self.fs.invalidate_cache()
        found = self._call("", lambda path: self.fs.find(path, detail=True))
        return {path.removeprefix(self.root).lstrip("/"): entry for path, entry in found.items()}

    def glob(self, pattern: str) -> list[str]:
        """Sorted paths in this folder that a pattern with `*`, `?` or `[]` names; over http(s) only its last part."""
        if self.is_read_only:
            folder, slash, last = pattern.rpartition("/")
            return [f"{folder}{slash}{name}" for name in fnmatch.filter(self.names(folder), last)]
        # The folder itself may be called like a pattern.
        found = self._call("", lambda path: self.fs.glob(f"{glob.escape(path)}/{pattern}"))
        return sorted(path.removeprefix(self.root).lstrip("/") for path in found)

    def size(self, relative: str) -> int:
        """Bytes of one file; raises FileNotFoundError."""
        size = self._call(relative, lambda path: self.fs.size(path))
        return len(self.read(relative)) if size is None else int(size)  # some web servers do not tell

    def names(self, relative: str = "") -> list[str]:
        """Sorted names of the entries of a folder, empty when there is no such folder."""
        self.fs.invalidate_cache()
        try:
            entries = self._call(relative, lambda path: self.fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        """All bytes of a file, or the range [start, end) as far as the file has it; raises FileNotFoundError."""
        data = self._sent(relative, start, end)
        if start is not None and end is not None and len(data) > end - start:
            data = data[start:end]  # a web server that knows no ranges sends the whole file
        return data

    def _sent(self, relative: str, start: int | None, end: int | None) -> bytes:
        """What the file system sends for a range: nothing from behind the end, or all where it knows no ranges."""
        if self.is_local:
            refuse_devices(self.path(relative))
        try:
            return cast(bytes, self._call(relative, lambda path: self.fs.cat_file(path, start=start, end=end)))
        except _RangeError:
            return b""

    def open(self, relative: str) -> Any:
        """A binary stream of a file, for libraries that seek in it; raises FileNotFoundError and CorruptShard.

        Over a network every read is a request of its own, with the retries and the errors of `read`.
        """
        if not self.is_local:
            return io.BufferedReader(_RemoteStream(self, relative), BLOCK)
        refuse_devices(self.path(relative))
        return self.fs.open(self.path(relative), "rb")

    def download(self, relative: str, target: Path, size: int) -> None:
        """Copy a file of `size` bytes to a local one; raises FileNotFoundError."""

        def get(path: str) -> None:
            self.fs.get_file(path, str(target))
            found = target.stat().st_size
            if found != size:
                raise ConnectionError(f"expected {size} bytes, got {found}")

        self._call(relative, get)

    def write(self, relative: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or none, whatever kills this process.

        Raises:
            UserError: a place that cannot be written to.
        """
        if self.is_local:
            self._write_local(relative, data)
            return
        if self.is_read_only:
            raise UserError(f"{self.url}: http(s) locations can only be read; write to a path or an object store")
        try:
            # Object stores publish a PUT only when it is complete.
            self._call(relative, lambda path: self.fs.pipe_file(path, data))
        except FileNotFoundError:
            raise UserError(f"{self.url}: cannot be written to: no such bucket or container") from None

    def _write_local(self, relative: str, data: bytes) -> None:
        for attempt in range(WRITE_ATTEMPTS):
            try:
                with atomic_file(Path(self.path(relative))) as stream:
                    stream.write(data)
                return
            except FileNotFoundError:
                # Another writer that has finished took our temporary file for a leftover.
                if attempt == WRITE_ATTEMPTS - 1:
                    raise

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed; only local folders have them."""
        if self.is_local:
            for path in Path(self.root).rglob(".*.tmp"):
                if not path.is_dir():
                    path.unlink(missing_ok=True)

    def remove(self, relative: str) -> None:
        """Remove a file.

        Raises:
            UserError: a link inside a local folder makes this a file outside.
        """
        if self.is_local:
            folder = Path(self.path(relative)).parent.resolve()
            if not folder.is_relative_to(Path(self.root).resolve()):
                raise UserError(f"{self.url}/{relative}: expected a file in this folder, found one in {folder}")
        self._call(relative, lambda path: self.fs.rm_file(path))

    def split(self) -> tuple[Location, str]:
        """The folder that holds this location, and its name there."""
        folder, _, name = self._base.rpartition("/")
        return Location((folder or ("/" if self._base.startswith("/") else ".")) + self._query, **self._options), name

    def below(self, relative: str) -> Location:
        """A folder in this one."""
        return Location(f"{self._base}/{relative}{self._query}", **self._options)

    def _call(self, relative: str, operation: Callable[[str], T]) -> T:
        """Run an operation on a path, with retries and readable errors where it goes over a network."""
        path = self.path(relative)
        if self.is_local:
            return operation(path)
        where = f"{self.url}/{relative}" if relative else self.url
        try:
            return retry(lambda: operation(path))
        except Exception as error:
            if isinstance(error, DatamergeError) or getattr(error, "errno", None) in _LOCAL:
                raise
            failure = error
        raise _explained(failure, where)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_fs", "root", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def __repr__(self) -> str:
        return f"Location({self.url!r})"


class _RemoteStream(io.RawIOBase):
    """A file that is not on this machine, a range request a read."""

    def __init__(self, location: Location, relative: str) -> None:
        self._location, self._relative = location, relative
        self._size, self._position = location.size(relative), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        data = self._location._sent(self._relative, start, end)
        if len(data) > end - start:
            if self._size > BLOCK:
                raise UserError(
                    f"{self._location.url}/{self._relative}: expected a server that knows byte ranges, found one "
                    f"that sends all {self._size} bytes each time; copy the file to this machine"
                )
            data = data[start:end]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class _RangeError(DatamergeError):
    """The range begins behind the end of the file."""


def _explained(failure: Exception, where: str) -> Exception:
    """The error to raise for what a driver raised: one line without secrets, FileNotFoundError for a missing file."""
    status = http_status(failure)
    if isinstance(failure, FileNotFoundError) and status in (None, 404, 410) and not is_transient(failure):
        return FileNotFoundError(errno.ENOENT, "no such file", where)
    if isinstance(failure, FileNotFoundError) and isinstance(failure.__cause__, Exception):
        failure = failure.__cause__  # some drivers call every failure a missing file
    reason = redact((str(failure).strip() or type(failure).__name__).splitlines()[0])
    if status == 416:
        return _RangeError(where)
    if status in (401, 403) or isinstance(failure, PermissionError) or "Credential" in type(failure).__name__:
        return UserError(f"{where}: access refused ({reason}); check the credentials in the environment or the URL")
    return DatamergeError(f"{where}: {type(failure).__name__}: {reason}; run the same command again to continue")


def _missing_driver(url: str, error: ImportError) -> str:
    protocol = url.partition("://")[0]
    extra = EXTRAS.get(protocol)
    hint = f"pip install 'datamerge[{extra}]'" if extra else str(error)
    return f"the driver for {protocol}:// is not installed; {hint}"
