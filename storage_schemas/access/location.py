"""A folder on any fsspec file system, with atomic writes of whole files, retries, and errors without secrets."""

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

from storage_schemas.access import streams
from storage_schemas.access.atomic import atomic_file
from storage_schemas.access.devices import refuse_devices
from storage_schemas.access.driver_options import options_for
from storage_schemas.access.explaining import ChangedFile, NoRanges, RangeError, Refused, explained, missing_driver
from storage_schemas.access.local_paths import absolute, local_part
from storage_schemas.access.redaction import redact, split_query
from storage_schemas.access.retries import retry
from storage_schemas.access.streams import RemoteStream, read_version
from storage_schemas.errors import DatamergeError, UserError

T = TypeVar("T")

# Errors of the local disk during a download.
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

WRITE_ATTEMPTS = 5
# Largest file, in bytes, that a web server without ranges may send whole for each range.
MOST_WHOLE = 64 * 2**20


class Location:
    """A root folder: a local path or any fsspec URL (``s3://``, ``gs://``, ``https://``, ``memory://``).

    Paths given to the methods are relative to the root and use ``/``. Transient failures of remote storage are
    retried. A query string, such as a signature, is kept and added to every path. A relative local path is resolved
    when the location is created, so later changes of the working directory do not matter.

    Args:
        url: path or URL of the folder.
        storage_options: options of the fsspec driver.

    Attributes:
        url: the path or URL with passwords and query values masked, for messages and manifests.
        root: the folder as its file system spells it.

    Raises:
        UserError: fsspec does not know the URL, its driver is not installed, or the server refuses access.
    """

    def __init__(self, url: str | os.PathLike[str], **storage_options: Any) -> None:
        text = os.fspath(url)
        base, self._query = split_query(text)
        self._base = base.rstrip("/") or "/"
        self.url = redact(self._base)
        if (path := local_part(self._base)) is not None:
            self._base = absolute(path)
        self._options = options_for(self._base, storage_options)
        # By path, the version (ETag or date) of each pinned file.
        self._versions: dict[str, str] = {}
        self._connect()

    def _connect(self) -> None:
        options = dict(self._options)
        is_s3 = self._base.startswith(("s3://", "s3a://"))
        if is_s3:
            # The retries of botocore, and those of s3fs around them, would multiply with ours.
            config = dict(options.get("config_kwargs") or {})
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}, **config}
        if "://" in self._base and "::" not in self._base:
            # Other processes write here too: a cached listing could hold sizes of files that were replaced since.
            options.setdefault("use_listings_cache", False)
        try:
            self._fs, self.root = self._file_system(options)
        except ImportError as error:
            raise UserError(f"{self.url}: {missing_driver(self._base, error)}") from None
        except ValueError as error:
            raise UserError(f"{self.url}: not a path or URL that fsspec knows ({redact(str(error))})") from None
        except Exception as error:  # drivers look up credentials here, and archive drivers open the archive
            raise explained(error, self.url) from None
        if is_s3:
            self._fs.retries = 1
        self._process = os.getpid()

    def _file_system(self, options: dict[str, Any]) -> tuple[Any, str]:
        """The file system, and the folder as it spells it."""
        if "://" not in self._base:  # `url_to_fs` would split a path that contains "::"
            return fsspec.filesystem("file", **options), self._base
        if self._base.startswith(("http://", "https://")) and "::" not in self._base:
            from storage_schemas.access.web import WebFileSystem  # its driver is optional

            return WebFileSystem(**options), self._base
        found: tuple[Any, str] = fsspec.core.url_to_fs(self._base, **options)
        return found

    @property
    def fs(self) -> Any:
        """The file system; reconnected in a forked process, where the parent's connections do not work."""
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
        if self._query or self.is_read_only:
            relative = relative.replace("?", "%3F")
        return (f"{self.root}/{relative}" if relative else str(self.root)) + self._query

    def local_path(self, relative: str) -> str | None:
        """Path of a local file with the contents of `relative`; None if reading it takes requests.

        Raises:
            FileNotFoundError: the location keeps local copies, and there is no such file to copy.
        """
        return self.path(relative) if self.is_local else None

    def forget(self, relatives: Iterable[str]) -> bool:
        """Drop local copies of these files; True if there was any. A plain location has none."""
        return False

    def exists(self, relative: str = "") -> bool:
        if self.is_local:
            return bool(self.fs.exists(self.path(relative)))
        try:
            # Not `exists`, which reports a failing server as a missing file: a merge would start over.
            self._call(relative, lambda path: self.fs.info(path))
        except FileNotFoundError:
            return False
        return True

    def is_file(self) -> bool:
        """Whether this location is one file; always True over http(s), which does not distinguish folders."""
        if self.is_local:
            return bool(self.fs.isfile(self.root))
        return bool(self._call("", lambda path: self.fs.info(path))["type"] == "file")

    def files(self) -> dict[str, Mapping[str, Any]]:
        """The file system's entry (`size`, `type`) of every file below this folder, by relative path."""
        self.fs.invalidate_cache()
        found = self._call("", lambda path: self.fs.find(path, detail=True))
        return {path.removeprefix(self.root).lstrip("/"): entry for path, entry in found.items()}

    def glob(self, pattern: str) -> list[str]:
        """Sorted relative paths that match a pattern with `*`, `?` or `[]`; over http(s) only in its last part."""
        if self.is_read_only:
            folder, slash, last = pattern.rpartition("/")
            return [f"{folder}{slash}{name}" for name in fnmatch.filter(self.names(folder), last)]
        # The folder's own name may contain wildcards.
        found = self._call("", lambda path: self.fs.glob(f"{glob.escape(path)}/{pattern}"))
        return sorted(path.removeprefix(self.root).lstrip("/") for path in found)

    def size(self, relative: str) -> int:
        """Size of one file in bytes; raises FileNotFoundError."""
        size = self._call(relative, lambda path: self.fs.size(path))
        return len(self.sent(relative, None, None)) if size is None else int(size)  # some web servers omit it

    def names(self, relative: str = "") -> list[str]:
        """Sorted names of the entries of a folder; empty if there is no such folder."""
        self.fs.invalidate_cache()
        try:
            entries = self._call(relative, lambda path: self.fs.ls(path, detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        """All bytes of a file, or the range [start, end), cut at the end of the file; raises FileNotFoundError."""
        return self.sent(relative, start, end)

    def sent(
        self,
        relative: str,
        start: int | None,
        end: int | None,
        most: int | None = None,
        delays: Iterable[float] | None = None,
    ) -> bytes:
        """Bytes [start, end) of a file, from the file system itself; empty past the end of the file.

        Args:
            relative: path of the file.
            start, end: range in bytes; None for the start and the end of the file.
            most: largest file, in bytes, that a web server without ranges may send whole; by default `MOST_WHOLE`.
            delays: see `retry`.

        Raises:
            FileNotFoundError: no such file.
            SourceError: the file has changed since it was pinned.
            UserError: a web server ignores ranges and the file is larger than `most`.
        """
        if self.is_local:
            refuse_devices(self.path(relative))
        version = self._versions.get(relative)
        more: dict[str, Any] = {}
        if self.is_read_only:
            more |= {"version": version, "most": most or MOST_WHOLE}

        def get(path: str) -> bytes:
            if version and not more:
                return read_version(self.fs, path, start, end, version)
            return cast(bytes, self.fs.cat_file(path, start=start, end=end, **more))

        try:
            return self._call(relative, get, delays)
        except RangeError:
            return b""

    def pin(self, relative: str) -> int:
        """Pin the current version of a file that will be read in several requests, and return its size in bytes.

        From now on reads of it, here and in copies of this location, fail if the file has changed. Changes cannot be
        detected on object stores other than S3, nor on servers that send neither ETag nor date. Local files are not
        checked.

        Raises:
            FileNotFoundError: no such file.
            SourceError: the file has changed since it was pinned before.
        """
        if self.is_local:
            return self.size(relative)
        entry = self._call(relative, lambda path: self.fs.info(path))
        version = str(entry.get("ETag") or "") if self.is_read_only or "s3" in self._fs.protocol else ""
        if version.startswith("W/") and not self.is_read_only:
            version = ""  # S3 never treats a weak ETag as equal
        if version and version != self._versions.setdefault(relative, version):
            changed = ChangedFile(f"{version}, expected {self._versions[relative]}")
            raise explained(changed, self._where(relative))
        size = entry["size"]
        return len(self.sent(relative, None, None)) if size is None else int(size)

    def open(self, relative: str) -> Any:
        """A seekable binary stream of a file.

        A remote file is pinned, and every read of it is one request with the retries and errors of `read`.

        Raises:
            FileNotFoundError: no such file.
            CorruptShard: a local path is a device or a pipe.
        """
        if not self.is_local:
            return io.BufferedReader(RemoteStream(self, relative), streams.BLOCK)
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
        """Write a file atomically: a reader sees all of it or none, even if this process is killed.

        Raises:
            UserError: the location cannot be written to.
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
                # Another writer finished and removed our temporary file as a leftover.
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
            UserError: a link inside a local folder leads to a file outside of it.
        """
        if self.is_local:
            folder = Path(self.path(relative)).parent.resolve()
            if not folder.is_relative_to(Path(self.root).resolve()):
                raise UserError(f"{self.url}/{relative}: expected a file in this folder, found one in {folder}")
        self._call(relative, lambda path: self.fs.rm_file(path))

    def split(self) -> tuple[Location, str]:
        """The parent folder of this location, and its name there."""
        folder, _, name = self._base.rpartition("/")
        shown, slash, _ = self.url.rpartition("/")
        return self._at(folder or "/", shown or slash or "."), name

    def below(self, relative: str) -> Location:
        """A subfolder of this location."""
        return self._at(f"{self._base}/{relative}", f"{self.url}/{relative}")

    def _at(self, base: str, shown: str) -> Location:
        """Another folder of this file system; `shown` is its `url` if it is local."""
        location = Location(f"{base}{self._query}", **self._options)
        if location.is_local:
            location.url = shown
        return location

    def _where(self, relative: str) -> str:
        return f"{self.url}/{relative}" if relative else self.url

    def _call(self, relative: str, operation: Callable[[str], T], delays: Iterable[float] | None = None) -> T:
        """Run an operation on a path; on remote storage with retries and readable errors."""
        path = self.path(relative)
        if self.is_local:
            return operation(path)
        try:
            return retry(lambda: operation(path), delays=delays)
        except Exception as error:
            is_ours = isinstance(error, DatamergeError) and not isinstance(error, Refused)
            if is_ours or getattr(error, "errno", None) in _LOCAL:
                raise
            failure = error
        # The driver's own error is not chained: it may show a secret.
        cause = failure if isinstance(failure, NoRanges) else None
        raise explained(failure, self._where(relative), is_signed=bool(self._query)) from cause

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = ("_fs", "root", "_process", "_fetcher")
        return {name: value for name, value in vars(self).items() if name not in of_this_process}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._connect()

    def __repr__(self) -> str:
        return f"Location({self.url!r})"
