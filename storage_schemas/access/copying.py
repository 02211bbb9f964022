"""Cached copies of one location's files; the calling thread fetches missing blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from storage_schemas.access.block_file import BLOCK, BlockFile, Bytes
from storage_schemas.access.explaining import NoRanges
from storage_schemas.access.fast_reads import Buffer, RangeReads
from storage_schemas.access.folder import Folder
from storage_schemas.access.location import Location
from storage_schemas.errors import CorruptShard, UserError

T = TypeVar("T")

LARGEST = 8 * 2**20  # bytes of the largest request


class NoDisk(Exception):
    """The disk of the cache has failed. The user was warned; the cache is no longer used."""


class _ServerError(Exception):
    """Wraps an OSError of the server, which `_disk` would otherwise take for a failure of the disk."""


class Copies:
    """Copies of the files of a location in the folder of a cache. Thread-safe.

    All methods raise NoDisk once the disk fails, and what `Location.sent` raises.

    Attributes:
        has_ranges: False once the server has ignored a byte range.
    """

    def __init__(self, location: Location, folder: Folder) -> None:
        self._location, self.folder = location, folder
        self._ranges = RangeReads(location)
        self.has_ranges = True
        self._names: dict[str, str] = {}
        self._inodes: dict[str, int] = {}  # by path, the inode of the copy that was read last

    @property
    def failed(self) -> bool:
        """Whether the disk has failed."""
        return self.folder.failed

    def open(self, path: str, size: int) -> BlockFile:
        """The copy of a file of this size, complete or not."""
        with self._disk():
            return self.folder.open(self._name(path), size)

    def opened(self, path: str) -> BlockFile | None:
        """The copy of a file, if this process has it open."""
        return self.folder.opened(self._name(path))

    def here(self, path: str, start: int, end: int, size: int | None) -> Bytes | None:
        """Bytes [start, end) of a copy that this process has open; None unless they are known to be present.

        Args:
            size: bytes of the file according to its sidecar.
        """
        file = self.opened(path)
        if file is None or file.size != size or file.missing(start, end) or not file.is_kept:
            return None
        self._inodes[path] = file.inode
        return file.view[start:end]

    def whole(self, path: str) -> BlockFile | None:
        """The copy of a file; None unless it is complete."""
        with self._disk():
            return self.folder.open(self._name(path), None)

    def used(self, path: str, file: BlockFile) -> BlockFile:
        """Record that a copy is read, and return it."""
        self._inodes[path] = file.inode
        return self.touched(file)

    def touched(self, file: BlockFile) -> BlockFile:
        """Record that a copy is in use, or soon will be, and return it."""
        with self._disk():
            file.touch()
        return file

    def published(self, file: BlockFile) -> str:
        """Path of a complete copy, under its final name."""
        with self._disk():
            self.folder.finish(file)
        return str(file.path)

    def fetch(
        self,
        path: str,
        file: BlockFile,
        start: int,
        end: int,
        unused_since: int | None = None,
        claimed: Callable[[], None] = lambda: None,
    ) -> bool | None:
        """Fetch the first run of blocks of bytes [start, end) that are missing and that nobody is fetching.

        Args:
            path: of the file.
            file: its copy.
            start, end: range in bytes.
            unused_since: see `Room.reserved`.
            claimed: called before the request, once other threads may fetch the next run.

        Returns:
            True if a run was fetched, or if the server turned out not to support ranges; None if there is no such
            run; False if there is no room.
        """
        if self.folder.room.is_full(unused_since):  # before the claim: others would wait for it in vain
            return False
        with self._disk():
            run = self.folder.claim(file, start, end, LARGEST)
        if run is None:
            return None
        first, last = run
        start, end = first * BLOCK, min(last * BLOCK, file.size)
        try:
            claimed()
            with self._disk(), self.folder.room.reserved(end - start + last - first, unused_since) as may_write:
                if may_write:
                    file.write(first, self._pieces(path, start, end))
                return may_write
        except UserError as error:
            if not isinstance(error.__cause__, NoRanges):
                raise
            self.has_ranges = False
            return True
        finally:
            with self._disk():
                self.folder.release(file, run)

    def _pieces(self, path: str, start: int, end: int) -> Iterator[Buffer]:
        at = start
        try:
            for piece in self._ranges.pieces(path, start, end, end - start):
                at += len(piece)
                if at > end:
                    break
                yield piece
        except FileNotFoundError as error:
            raise _ServerError(error) from None
        if at != end:
            raise CorruptShard(
                f"{self._location.url}/{path}: expected {end - start} bytes at {start}, found {at - start}; it is "
                "cut short"
            )

    def download(self, path: str, size: int) -> bool:
        """Fetch a whole file from a server without ranges; False if there is no room for it."""
        name = self._name(path)
        with self._disk(), self.folder.alone(name):
            if self.folder.open(name, None) is not None:
                return True
            with self.folder.room.reserved(size) as may_write, self.folder.temporary() as new:
                if may_write:
                    self._request(lambda: self._location.download(path, new, size))
                    self.folder.forget(name, None)
                    new.replace(self.folder.path / name)
                return may_write

    def keep(self, path: str) -> bytes:
        """A whole file of unknown size, from the cache or from the server with one request."""
        name = self._name(path)
        with self._disk():
            if (file := self.whole(path)) is not None:
                return self.used(path, file).view.tobytes()
            with self.folder.alone(name):
                if (file := self.whole(path)) is not None:
                    return self.used(path, file).view.tobytes()
                data = self._request(lambda: self._location.sent(path, None, None))
                self.folder.put(name, data)
        return data

    def forget(self, path: str) -> bool:
        """Drop the copy of a file; True if there was one."""
        return self.folder.forget(self._name(path), self._inodes.pop(path, None))

    def _name(self, path: str) -> str:
        if (name := self._names.get(path)) is None:
            name = self._names[path] = hashlib.sha256(f"{self._location.url}/{path}".encode()).hexdigest()
        return name

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """Turn an OSError of the disk into NoDisk, with one warning."""
        try:
            yield
        except _ServerError as error:
            raise error.args[0] from None
        except OSError as error:
            self.folder.give_up(error, self._location.url)
            raise NoDisk from error

    @staticmethod
    def _request(request: Callable[[], T]) -> T:
        """Make a request inside `_disk` without its missing file counting as a failure of the disk."""
        try:
            return request()
        except FileNotFoundError as error:
            raise _ServerError(error) from None
