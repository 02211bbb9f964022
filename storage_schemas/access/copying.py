"""Copies of one location's files, in a cache: what is missing is fetched, by the thread that asks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from storage_schemas.access.blocks import BLOCK, BlockFile, Bytes, Folder
from storage_schemas.access.explaining import NoRanges
from storage_schemas.access.fast_reads import Buffer, RangeReads
from storage_schemas.access.location import Location
from storage_schemas.errors import CorruptShard, UserError

T = TypeVar("T")

LARGEST = 8 * 2**20  # bytes of a request


class NoDisk(Exception):
    """The disk of the cache has failed; that is said, and the cache is left alone."""


class _OfServer(Exception):
    """Its argument is no failure of the disk, though it looks like one."""


class Copies:
    """Files of a location in the folder of a cache. Safe for threads.

    All methods raise NoDisk once the disk fails, and what `Location.sent` raises.

    Attributes:
        has_ranges: whether the server knows any, as far as has been seen.
    """

    def __init__(self, location: Location, folder: Folder) -> None:
        self._location, self.folder = location, folder
        self._ranges = RangeReads(location)
        self.has_ranges = True
        self._names: dict[str, str] = {}
        self._inodes: dict[str, int] = {}  # of what was read last, by path

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
        """Bytes of a copy that this process has open, if it is known that they are there.

        Args:
            size: of the file, as the artifact says.
        """
        file = self.opened(path)
        if file is None or file.size != size or file.missing(start, end) or not file.is_kept:
            return None
        self._inodes[path] = file.inode
        return file.view[start:end]

    def whole(self, path: str) -> BlockFile | None:
        """The copy of a file, if it is complete."""
        with self._disk():
            return self.folder.open(self._name(path), None)

    def used(self, path: str, file: BlockFile) -> BlockFile:
        """The same copy, of which it is known that it is read."""
        self._inodes[path] = file.inode
        return self.touched(file)

    def touched(self, file: BlockFile) -> BlockFile:
        """The same copy, which is in use, or will be soon."""
        with self._disk():
            file.touch()
        return file

    def published(self, file: BlockFile) -> str:
        """The path of a copy, which is complete."""
        with self._disk():
            self.folder.finish(file)
        return str(file.path)

    def fetch(self, path: str, file: BlockFile, start: int, end: int, unused_since: int | None = None) -> bool | None:
        """Fetch the first run of blocks that bytes [start, end) lack and that nobody is fetching.

        Args:
            path: of the file.
            file: its copy.
            start, end: of the bytes.
            unused_since: see `Room.reserved`.

        Returns:
            True, also where the server turns out to know no ranges; None if there is no such run; False if there is
            no room.
        """
        if self.folder.room.is_full(unused_since):  # or others would wait for what is claimed in vain
            return False
        with self._disk():
            run = self.folder.claim(file, start, end, LARGEST)
        if run is None:
            return None
        first, last = run
        start, end = first * BLOCK, min(last * BLOCK, file.size)
        try:
            with self._disk(), self.folder.room.reserved(end - start + last - first, unused_since) as may_write:
                if may_write:
                    file.write(first, self._of_server(lambda: self._get(path, start, end)))
                return may_write
        except UserError as error:
            if not isinstance(error.__cause__, NoRanges):
                raise
            self.has_ranges = False
            return True
        finally:
            with self._disk():
                self.folder.release(file, run)

    def _get(self, path: str, start: int, end: int) -> Buffer:
        data = self._ranges.get(path, start, end, end - start)
        if len(data) != end - start:
            raise CorruptShard(
                f"{self._location.url}/{path}: expected {end - start} bytes at {start}, found {len(data)}; it is "
                "cut short"
            )
        return data

    def download(self, path: str, size: int) -> bool:
        """Fetch a whole file, of a server that knows no ranges; False if there is no room for it."""
        name = self._name(path)
        with self._disk(), self.folder.alone(name):
            if self.folder.open(name, None) is not None:
                return True
            with self.folder.room.reserved(size) as may_write, self.folder.temporary() as new:
                if may_write:
                    self._of_server(lambda: self._location.download(path, new, size))
                    self.folder.forget(name, None)
                    new.replace(self.folder.path / name)
                return may_write

    def keep(self, path: str) -> bytes:
        """A whole file, of the cache or of the server, in one request though nobody knows its size."""
        name = self._name(path)
        with self._disk():
            if (file := self.whole(path)) is not None:
                return self.used(path, file).view.tobytes()
            with self.folder.alone(name):
                if (file := self.whole(path)) is not None:
                    return self.used(path, file).view.tobytes()
                data = self._of_server(lambda: self._location.sent(path, None, None))
                self.folder.put(name, data)
        return data

    def forget(self, path: str) -> bool:
        """Drop the copy of a file; whether there was one."""
        return self.folder.forget(self._name(path), self._inodes.pop(path, None))

    def _name(self, path: str) -> str:
        if (name := self._names.get(path)) is None:
            name = self._names[path] = hashlib.sha256(f"{self._location.url}/{path}".encode()).hexdigest()
        return name

    @contextmanager
    def _disk(self) -> Iterator[None]:
        """While the disk is used; that it fails is said once."""
        try:
            yield
        except _OfServer as error:
            raise error.args[0] from None
        except OSError as error:
            self.folder.give_up(error, self._location.url)
            raise NoDisk from error

    @staticmethod
    def _of_server(request: Callable[[], T]) -> T:
        """The result of a request that is made amid work on the disk, which does not fail with it."""
        try:
            return request()
        except FileNotFoundError as error:
            raise _OfServer(error) from None
