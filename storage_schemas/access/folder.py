"""Local copies of remote files, block by block, shared by all processes of a machine and any number of artifacts.

An incomplete copy is named `NAME.SIZE.blocks`, where NAME is a hash. It holds `SIZE` bytes, sparse, followed by one
mark per block of 4 KiB: a byte that is 1 once the block is present. To fetch blocks, a process

1. claims a run of them by a POSIX lock on as many bytes of the file `claims`, which the system releases if the
   process is killed;
2. reads the marks again, because the blocks may have arrived meanwhile;
3. fetches the run with one request, writes the answer in place as it comes, and marks each block once it is whole.

Other processes wait for the marks or for the release of the claim. When all marks are set they are cut off, and the
copy is renamed to `NAME`: from then on it is an ordinary file that can be memory-mapped.

A process that reads or fetches a file holds a shared lock on it, which lasts as long as any view of its memory map.
Files without a lock may be evicted when the byte limit demands it (`room`). A power cut may leave a mark without its
block. This and any other damage fails the record's checksum; the copy is then dropped and fetched again.
"""

from __future__ import annotations

import fcntl
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

from storage_schemas.access.block_file import BLOCK, BlockFile
from storage_schemas.access.room import Room, locked

OPEN_FILES = 128  # per process; each has a map and descriptors


class Folder:
    """The copies in one folder, as this process sees them; all threads share one instance (see `folder_of`).

    Attributes:
        changed: guards the open files; notified when blocks arrive or a claim on them is released.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path, self.room = path, Room(path, max_bytes, self._let_go)
        self.changed = threading.Condition()
        self.failed = False
        self._open: OrderedDict[str, BlockFile] = OrderedDict()
        self._claims: int | None = None

    def opened(self, name: str) -> BlockFile | None:
        """A copy that this process has open, without a system call; another process may have dropped it since."""
        return self._open.get(name)

    @overload
    def open(self, name: str, size: int) -> BlockFile: ...
    @overload
    def open(self, name: str, size: None) -> BlockFile | None: ...
    def open(self, name: str, size: int | None) -> BlockFile | None:
        """Open a copy for reading or filling.

        Args:
            size: bytes of the file; a missing copy is created. None opens an existing complete copy of any size.

        Returns:
            The copy; None if `size` is None and there is no complete copy.

        Raises:
            OSError: the disk failed.
        """
        with self.changed:
            file = self._open.get(name)
            if file is not None and file.is_kept and (file.is_complete if size is None else size == file.size):
                self._open.move_to_end(name)
                return file
        file = self._open_or_create(name, size)
        if file is None:
            return None
        if file.is_complete:
            self.finish(file)  # the process that filled it was killed before it could
        with self.changed:
            other = self._open.get(name)
            if other is not None and other.inode == file.inode:
                return other  # opened by another thread, which may be fetching into it
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

    def _open_or_create(self, name: str, size: int | None) -> BlockFile | None:
        if (file := self._existing(name, size)) is not None or size is None:
            return file
        with self._names():
            return self._existing(name, size) or self._create(name, size)

    def _create(self, name: str, size: int) -> BlockFile:
        """Create a copy without blocks. It is locked before it is renamed: unlocked copies may be evicted."""
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
                        continue  # evicted between the open and the lock
                    found = status.st_size
                    whole = found if size is None else size
                    if found == whole or (path.name != name and found == whole + -(-whole // BLOCK)):
                        file = BlockFile(name, whole, os.dup(descriptor), path)
                        return file
                finally:
                    os.close(descriptor)
                path.unlink(missing_ok=True)  # truncated, or a copy of an artifact that was replaced
                break
        return None

    def _partial(self, name: str, size: int) -> Path:
        return self.path / f"{name}.{size}.blocks"

    @contextmanager
    def _names(self) -> Iterator[None]:
        """Hold the lock under which copies are created, renamed and dropped."""
        self.path.mkdir(parents=True, exist_ok=True)
        with locked(self.path / "lock-names"):
            yield

    def claim(self, file: BlockFile, start: int, end: int, most: int) -> tuple[int, int] | None:
        """Claim the first run of blocks of the bytes [start, end) that are missing and that nobody is fetching.

        Args:
            most: largest length of the run in bytes.

        Returns:
            The run, blocks [first, last), which the caller passes to `release`; None if there is none.
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
                        continue  # some of them arrived before the claim
                    file.busy[first:last] = True
                    return first, last
                at, step = first + step, 2 * step  # another process has claimed a run of unknown length from here
        return None

    def release(self, file: BlockFile, run: tuple[int, int]) -> None:
        """Release a claimed run, filled or not, and rename the copy if it is complete now."""
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
        """Cut the marks off a complete copy and give it its final name."""
        if file.path.name == file.name:
            return
        with self._names():
            try:
                if file.path.stat().st_ino == file.inode:  # not a newer copy, made after this one was dropped
                    file.cut()
                    file.path = file.path.replace(self.path / file.name)
            except FileNotFoundError:
                pass  # another process was first

    @contextmanager
    def alone(self, name: str) -> Iterator[None]:
        """Hold a file's own lock, among all threads and processes, for fetching the file with one request."""
        with locked(self.path / f"lock-{name}", keep=False):
            yield

    def put(self, name: str, data: bytes) -> None:
        """Store a whole file if there is room for it.

        Raises:
            OSError: the disk failed.
        """
        with self.room.reserved(len(data)) as may_write, self.temporary() as new:
            if may_write:
                new.write_bytes(data)
                new.replace(self.path / name)

    @contextmanager
    def temporary(self) -> Iterator[Path]:
        """A path for a file that the caller renames once it is whole; otherwise it is removed."""
        path = self.path / f".{secrets.token_hex(6)}.tmp"
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def forget(self, name: str, inode: int | None) -> bool:
        """Drop a copy.

        Args:
            inode: of the damaged copy, so that a copy which has replaced it is kept; None for any.

        Returns:
            Whether there was one.
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
            # Never closed: closing any descriptor of a file releases all POSIX locks of the process on it.
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
        """Stop using the disk after an error, and warn once."""
        with self.changed:
            warned, self.failed = self.failed, True
        if not warned:
            warnings.warn(
                f"cache {self.path}: {error.strerror or error}; reading {url} without it",
                RuntimeWarning,
                stacklevel=3,
            )


def _place(name: str) -> int:
    """Offset of a file's claims in `claims`; two files with the same offset wait for each other needlessly."""
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
    """Start a child process with empty state: it has none of its parent's threads, which may hold locks."""
    global _MAKING
    _MAKING = threading.Lock()
    _FOLDERS.clear()


os.register_at_fork(after_in_child=_after_fork)
