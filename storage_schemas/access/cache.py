"""Local copies of a remote artifact's files: whole files, a byte limit, shared by all processes of a machine.

The least recently used copies go first. Copies are written under a temporary name and renamed; a lock per file
lets one process fetch what several want. What a copy holds is checked like any other file's content: a damaged
or outdated one fails its record's checksum, is dropped and fetched again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from storage_schemas.access.local_paths import absolute
from storage_schemas.access.location import Location
from storage_schemas.errors import ConfigError
from storage_schemas.schema.manifest import MANIFEST

# Lock files, for any number of copies; two fetches rarely share one.
LOCKS = 64
PART = ".part"
_COPY = re.compile(r"[0-9a-f]{64}(\.\d+\.part)?")


@dataclass(frozen=True)
class Cache:
    """A folder for copies of remote files and the bytes it may hold; any number of artifacts may share it.

    Raises:
        ConfigError: a limit that is not positive, or a folder that cannot be made.
    """

    folder: Path
    max_bytes: int

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"cache: expected a positive limit in bytes, found {self.max_bytes}")
        object.__setattr__(self, "folder", Path(absolute(self.folder)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache: {self.folder}: expected a folder for copies ({error.strerror})") from None

    def lock(self, name: str) -> FileLock:
        """The lock of one copy, by its name."""
        return FileLock(self.folder / _lock_name(name))

    def reserve(self, name: str, size: int) -> Path | None:
        """A part file to be filled with `size` bytes, others evicted to make room; None if there is none.

        The caller holds the copy's lock.
        """
        # The name counts, from now on and for the other processes too: the file itself is still to grow.
        part = self.folder / f"{name}.{size}{PART}"
        with FileLock(self.folder / "lock-space"):
            part.unlink(missing_ok=True)
            if size > self.max_bytes or not self._make_room(size, name):
                return None
            part.touch()
        return part

    def _make_room(self, size: int, wanted: str) -> bool:
        """Evict the least recently used copies until `size` more bytes fit; False if fetches in progress fill it."""
        copies = []
        for entry in os.scandir(self.folder):
            if not _COPY.fullmatch(entry.name):
                continue  # a lock, or a file of somebody else, who chose a folder that was not empty
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue  # dropped by another process
            taken = int(entry.name.split(".")[1]) if entry.name.endswith(PART) else status.st_size
            copies.append((status.st_mtime_ns, taken, entry.name))
        excess = sum(taken for _, taken, _ in copies) + size - self.max_bytes
        for _, taken, name in sorted(copies):
            if excess <= 0:
                break
            # The caller holds the lock of what it wants: nobody is fetching another part of that lock.
            if name.endswith(PART) and _lock_name(name) != _lock_name(wanted) and self._is_fetching(name):
                continue
            (self.folder / name).unlink(missing_ok=True)
            excess -= taken
        return excess <= 0

    def _is_fetching(self, part: str) -> bool:
        """Whether a process is still filling this part file; a killed one has lost its lock."""
        try:
            with self.lock(part).acquire(blocking=False):
                return False
        except Timeout:
            return True


class CachedLocation(Location):
    """A read-only view of a remote location through a `Cache`. A local folder is read in place.

    The manifest is always fetched: it is what tells old copies from new ones.
    """

    cache: Cache

    @classmethod
    def of(cls, location: Location, cache: Cache) -> CachedLocation:
        """The same location, through a cache."""
        cached = cls.__new__(cls)
        cached.__setstate__({**location.__getstate__(), "cache": cache})
        return cached

    def local_path(self, relative: str) -> str | None:
        if self.is_local or relative == MANIFEST:
            return super().local_path(relative)
        copy = self.cache.folder / self._name(relative)
        try:
            if not _touch(copy) and not self._fetch(relative, copy):
                return None
        except FileNotFoundError:
            raise
        except OSError as error:
            warnings.warn(
                f"cache {self.cache.folder}: {error.strerror or error}; reading {self.url} without it",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return str(copy)

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        local = None if self.is_local else self.local_path(relative)
        if local is not None:
            try:
                with Path(local).open("rb") as stream:
                    stream.seek(start or 0)
                    return stream.read() if end is None else stream.read(end - (start or 0))
            except FileNotFoundError:
                pass  # evicted since
        return super().read(relative, start, end)

    def forget(self, relatives: Iterable[str]) -> bool:
        if self.is_local:
            return False
        dropped = False
        for relative in relatives:
            try:
                (self.cache.folder / self._name(relative)).unlink()
            except FileNotFoundError:
                continue
            dropped = True
        return dropped

    def _name(self, relative: str) -> str:
        return hashlib.sha256(f"{self.url}/{relative}".encode()).hexdigest()

    def _fetch(self, relative: str, copy: Path) -> bool:
        """Make the copy, unless another process does while this one waits; False if there is no room for it."""
        self.cache.folder.mkdir(parents=True, exist_ok=True)
        with self.cache.lock(copy.name):
            if _touch(copy):
                return True
            size = self.size(relative)
            part = self.cache.reserve(copy.name, size)
            if part is None:
                return False
            try:
                self.download(relative, part, size)
                part.replace(copy)
            finally:
                part.unlink(missing_ok=True)
        return True


def _lock_name(name: str) -> str:
    return f"lock-{int(name[:8], 16) % LOCKS:02d}"


def _touch(copy: Path) -> bool:
    """Mark a copy as used now; False if there is none. Access times proper are off on many machines."""
    try:
        os.utime(copy, ns=(time.time_ns(), time.time_ns()))
    except FileNotFoundError:
        return False
    return True
