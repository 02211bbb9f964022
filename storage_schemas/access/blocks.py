"""Copies of remote files on a disk, block by block, for all processes of a machine and any number of artifacts.

A file that is not complete is `NAME.SIZE.blocks`: `SIZE` bytes, sparse, then a byte a block of 4 KiB that is 1 once
the block is there. Whoever wants blocks claims a run of them, by a lock of the system on as many bytes of `claims`,
so that a killed process lets go of them; looks whether they have come meanwhile; fetches them with one request,
writes them at their place, and marks them. Others wait for the marks, or for the claim to fall free. Once all marks
are set they are cut off, and the file is called `NAME`: a copy like any other file, to be memory-mapped. NAME is a
hash.

Who reads or fetches a file has it open under a shared lock, which lasts as long as any view of its map. What is not
in use may be evicted as soon as the limit demands it (`room`). A power cut may leave a mark without its block. That,
and any other damage, is found as in other files: the record's checksum fails, the copy is dropped and fetched again.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt

from storage_schemas.access.room import Room, locked

Bytes = npt.NDArray[np.uint8]

BLOCK = 4096  # bytes; little more is fetched than is asked for, and a page of sparse files is as large
OPEN_FILES = 128  # a process keeps open; each has a map and descriptors


class BlockFile:
    """An open copy, complete or not. What is shared among threads is guarded by its folder's `changed`."""

    def __init__(self, name: str, size: int, descriptor: int, path: Path) -> None:
        self.name, self.size, self.path = name, size, path
        self._descriptor = descriptor
        self.inode = os.fstat(descriptor).st_ino
        # The map has a copy of the descriptor, and the lock on it lasts while any view does.
        self.view: Bytes = (
            np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
            if size
            else np.empty(0, np.uint8)
        )
        self.here = np.zeros(-(-size // BLOCK), np.bool_)
        self.busy = np.zeros(len(self.here), np.bool_)  # being fetched by this process
        self._complete = False
        self.refresh(0, len(self.here))

    def refresh(self, first: int, last: int) -> None:
        """Take over the marks of blocks [first, last) that other processes have set."""
        marks = os.pread(self._descriptor, last - first, self.size + first)
        if marks:
            self.here[first:last] |= np.frombuffer(marks, np.bool_)[: last - first]
        else:  # cut off: all are set
            self.here[:] = True

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are here, as far as is known in this process."""
        self._complete = self._complete or bool(self.here.all())
        return self._complete

    def missing(self, start: int, end: int, *, or_coming: bool = False) -> bool:
        """Whether any of the bytes [start, end) has not come, as far as is known here.

        Args:
            or_coming: nor is being fetched by this process.
        """
        if self._complete:
            return False
        blocks = slice(start // BLOCK, -(-end // BLOCK))
        return not (self.here[blocks] | self.busy[blocks] if or_coming else self.here[blocks]).all()

    def write(self, first: int, data: bytes | memoryview) -> None:
        """Fill blocks from `first` on, and mark them."""
        view, at = memoryview(data).cast("B"), first * BLOCK
        while view:
            written = os.pwrite(self._descriptor, view, at)
            view, at = view[written:], at + written
        last = -(-at // BLOCK)
        os.pwrite(self._descriptor, bytes([1]) * (last - first), self.size + first)
        self.here[first:last] = True

    @property
    def is_kept(self) -> bool:
        """Whether the copy is still in its folder: not evicted, nor forgotten by another process."""
        return os.fstat(self._descriptor).st_nlink > 0

    def touch(self) -> None:
        """Mark the copy as used now; access times proper are off on many machines."""
        os.utime(self._descriptor)

    def cut(self) -> None:
        """Take the marks off."""
        os.ftruncate(self._descriptor, self.size)

    def __del__(self) -> None:
        if (descriptor := vars(self).pop("_descriptor", None)) is not None:
            os.close(descriptor)


class Folder:
    """The copies in one folder, as this process sees them; all its threads share one `Folder` a folder.

    Attributes:
        changed: guards the open files; notified when blocks have come or are given up.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.room = path, Room(path, max_bytes, self._let_go)
        self.changed = threading.Condition()
        self.failed = False
        self._open: OrderedDict[str, BlockFile] = OrderedDict()
        self._claims: int | None = None

    def opened(self, name: str) -> BlockFile | None:
        """A copy that this process has open, at no cost; another process may have dropped it meanwhile."""
        return self._open.get(name)

    @overload
    def open(self, name: str, size: int) -> BlockFile: ...
    @overload
    def open(self, name: str, size: None) -> BlockFile | None: ...
    def open(self, name: str, size: int | None) -> BlockFile | None:
        """A copy to read or to fill; made if there is none.

        Args:
            size: bytes of the file; None for those of whatever complete copy is there, and None if none is.

        Raises:
            OSError: the disk.
        """
        with self.changed:
            file = self._open.get(name)
            if file is not None and file.is_kept and (file.is_complete if size is None else size == file.size):
                self._open.move_to_end(name)
                return file
        file = self._found(name, size)
        if file is None:
            return None
        if file.is_complete:
            self.finish(file)  # whoever filled it was killed before
        with self.changed:
            other = self._open.get(name)
            if other is not None and other.inode == file.inode:
                return other  # of another thread, which may be fetching
            self._open[name] = file
            while len(self._open) > OPEN_FILES and (idle := self._idle()) is not None:
                del self._open[idle]
        return file

    def _let_go(self, name: str) -> bool:
        """Close a copy; False if it is being fetched."""
        with self.changed:
            file = self._open.get(name)
            if file is not None and file.busy.any():
                return False
            self._open.pop(name, None)
        return True

    def _idle(self) -> str | None:
        return next((name for name, file in self._open.items() if not file.busy.any()), None)

    def _found(self, name: str, size: int | None) -> BlockFile | None:
        if (file := self._existing(name, size)) is not None or size is None:
            return file
        with self._names():
            return self._existing(name, size) or self._made(name, size)

    def _made(self, name: str, size: int) -> BlockFile:
        """A copy without any blocks, open before it has its name: others may evict what nobody has open."""
        path = self._partial(name, size)
        with self.temporary() as new:
            descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH)
                os.ftruncate(descriptor, size + -(-size // BLOCK))
                new.replace(path)
                return BlockFile(name, size, os.dup(descriptor), path)
            finally:
                os.close(descriptor)

    def _existing(self, name: str, size: int | None) -> BlockFile | None:
        for path in [self.path / name, *([] if size is None else [self._partial(name, size)])]:
            while True:
                try:
                    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    break
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_SH)
                    status = os.fstat(descriptor)
                    if not status.st_nlink:
                        continue  # evicted between the two
                    found = status.st_size
                    whole = found if size is None else size
                    if found == whole or (path.name != name and found == whole + -(-whole // BLOCK)):
                        file = BlockFile(name, whole, os.dup(descriptor), path)
                        return file
                finally:
                    os.close(descriptor)
                path.unlink(missing_ok=True)  # cut short, or of an artifact that was replaced
                break
        return None

    def _partial(self, name: str, size: int) -> Path:
        return self.path / f"{name}.{size}.blocks"

    @contextmanager
    def _names(self) -> Iterator[None]:
        """While files are made, renamed or forgotten."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock-names"):
            yield

    def claim(self, file: BlockFile, start: int, end: int, most: int) -> tuple[int, int] | None:
        """Claim the first run of missing blocks of the bytes [start, end) that nobody is fetching.

        Args:
            most: bytes of the run.

        Returns:
            The run, blocks [first, last), which the caller gives back with `release`; None if there is none.
        """
        at, stop, step = start // BLOCK, -(-end // BLOCK), 1
        with self.changed:
            while at < stop:
                free = np.flatnonzero(~(file.here[at:stop] | file.busy[at:stop]))
                if not len(free):
                    return None
                first = at + int(free[0])
                taken = np.flatnonzero(file.here[first:stop] | file.busy[first:stop])
                last = min(first + int(taken[0]) if len(taken) else stop, first + max(1, most // BLOCK))
                while not self._lock(file.name, first, last):
                    if last - first == 1:
                        file.refresh(first, stop)
                        break
                    last = (first + last) // 2
                else:
                    file.refresh(first, last)
                    come = np.flatnonzero(file.here[first:last])
                    if len(come):
                        self._unlock(file.name, first, last)
                        continue  # some of them came before the claim
                    file.busy[first:last] = True
                    return first, last
                at, step = first + step, 2 * step  # another process has a run from here on, of unknown length
        return None

    def release(self, file: BlockFile, run: tuple[int, int]) -> None:
        """Give a claimed run back, filled or not; a file that is complete now gets its name."""
        first, last = run
        with self.changed:
            file.busy[first:last] = False
            self._unlock(file.name, first, last)
            self.changed.notify_all()
        if file.here[first:last].all():
            file.refresh(0, len(file.here))
            if file.is_complete:
                self.finish(file)

    def finish(self, file: BlockFile) -> None:
        if file.path.name == file.name:
            return
        with self._names():
            try:
                if file.path.stat().st_ino == file.inode:  # not one made since this was forgotten
                    file.cut()
                    file.path = file.path.replace(self.path / file.name)
            except FileNotFoundError:
                pass  # another process was first

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Be the only one, of all threads and processes, that fetches a file of unknown size."""
        with locked(self.path / f"lock-{int(name[:8], 16) % 64:02d}"):
            yield

    def put(self, name: str, data: bytes) -> None:
        """Keep a whole file, if there is room for it.

        Raises:
            OSError: the disk.
        """
        with self.room.reserved(len(data)) as may_write, self.temporary() as new:
            if may_write:
                new.write_bytes(data)
                new.replace(self.path / name)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """Where to write a file that is renamed once it is whole; what is there in the end is removed."""
        path = self.path / f".{secrets.token_hex(6)}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def forget(self, name: str, inode: int | None) -> bool:
        """Drop a copy; whether there was one.

        Args:
            inode: of the copy that is damaged, which another process may have replaced since; None for any.
        """
        with self.changed:
            dropped = self._open.pop(name, None) is not None
        with self._names():
            for path in [self.path / name, *self.path.glob(f"{name}.*.blocks")]:
                try:
                    if inode in (None, path.stat().st_ino):
                        path.unlink()
                        dropped = True
                except FileNotFoundError:
                    continue
        return dropped

    def _lock(self, name: str, first: int, last: int) -> bool:
        if self._claims is None or not os.fstat(self._claims).st_nlink:
            # Never closed: a process that closes any descriptor of a file lets go of all its locks on it.
            self._claims = os.open(self.path / "claims", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, last - first, _place(name) + first)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, name: str, first: int, last: int) -> None:
        assert self._claims is not None
        fcntl.lockf(self._claims, fcntl.LOCK_UN, last - first, _place(name) + first)

    def give_up(self, error: OSError, url: str) -> None:
        """Say once that the disk does not work, and that it is left alone from now on."""
        with self.changed:
            said, self.failed = self.failed, True
        if not said:
            warnings.warn(
                f"cache {self.path}: {error.strerror or error}; reading {url} without it",
                RuntimeWarning,
                stacklevel=3,
            )


def _place(name: str) -> int:
    """Where the claims of a file are; where two share a place they wait for each other without need."""
    return int(name[:8], 16) << 28


_FOLDERS: dict[Path, Folder] = {}
_MAKING = threading.Lock()


def folder_of(path: Path, max_bytes: int) -> Folder:
    """This process's `Folder` for a path."""
    with _MAKING:
        folder = _FOLDERS.setdefault(path, Folder(path, max_bytes))
        folder.room.max_bytes = max_bytes
        return folder


def _after_fork() -> None:
    """A child begins anew: its parent's threads, and what they hold, are not there."""
    global _MAKING
    _MAKING = threading.Lock()
    _FOLDERS.clear()


os.register_at_fork(after_in_child=_after_fork)
