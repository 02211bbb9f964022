"""The byte limit of a cache's folder, which all processes observe together.

Before a process writes, it reserves bytes, many at a time, in a `grant-…` file that it keeps locked; the grants of
dead processes are void. Reserved bytes that are already written may count twice for a while, so the limit is never
exceeded. To make room, the least recently used copies that no process has open are evicted.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# A grant has at most LARGEST_GRANT bytes, and at most 1/GRANTS of the limit unless one write needs more.
LARGEST_GRANT, GRANTS = 256 * 2**20, 64
REFUSED_SECONDS = 1.0  # before a full cache is scanned again
ABANDONED = 3600  # seconds without a write after which an unfinished file counts as abandoned

_COPY = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.(blocks|part))?")
_GRANT = re.compile(r"grant-[0-9a-f]{12}")
_LOCK = re.compile(r"lock-[0-9a-f]{64}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")


class Room:
    """This process's share of the byte limit of a cache's folder."""

    def __init__(self, path: Path, max_bytes: int, let_go: Callable[[str], bool]) -> None:
        """Create one without a grant.

        Args:
            path: of the folder.
            max_bytes: limit of all copies in it.
            let_go: closes this process's own copy of a name; returns False if it is being fetched.
        """
        self._path, self.max_bytes, self._let_go = path, max_bytes, let_go
        self._lock = threading.Lock()
        self._grant: tuple[Path, int] | None = None
        self._granted = self._flying = self._stated = 0  # bytes: unused, being written, and stated in the grant file
        self._refused = {True: 0.0, False: 0.0}  # by whether any copy might be evicted, when to ask again

    @contextmanager
    def reserved(self, size: int, unused_since: int | None = None) -> Iterator[bool]:
        """Reserve room while `size` bytes are written; yields whether they may be.

        Args:
            size: in bytes.
            unused_since: time in ns; only copies that were last used before it may be evicted. None for any copy.

        Raises:
            OSError: the disk failed.
        """
        with self._lock:
            may = self._granted >= size or (not self._is_refused(unused_since) and self._ask(size, unused_since))
            if may:
                self._granted -= size
                self._flying += size
        try:
            yield may
        finally:
            if may:
                with self._lock:
                    self._flying -= size
                    if self._granted + self._flying <= self._stated // 2:  # written bytes no longer need the grant
                        with locked(self._path / "lock-space"):
                            self._write_grant()

    def is_full(self, unused_since: int | None = None) -> bool:
        """Whether the folder was found full within `REFUSED_SECONDS`; costs no system call."""
        return not self._granted and self._is_refused(unused_since)

    def _is_refused(self, unused_since: int | None) -> bool:
        # If there is no room although any copy may be evicted, there is none with fewer candidates either.
        refused = max(until for kind, until in self._refused.items() if kind or unused_since is not None)
        return time.monotonic() < refused

    def _ask(self, size: int, unused_since: int | None) -> bool:
        self._path.mkdir(parents=True, exist_ok=True)
        with locked(self._path / "lock-space"):
            for granted in (max(size, min(LARGEST_GRANT, self.max_bytes // GRANTS)), size):
                if self._make_room(granted + self._flying, unused_since):
                    self._granted = granted
                    break
            else:
                self._granted = 0
                self._refused[unused_since is None] = time.monotonic() + REFUSED_SECONDS
            self._write_grant()
        return self._granted >= size

    def _write_grant(self) -> None:
        if self._grant is None or not os.fstat(self._grant[1]).st_nlink:
            path = self._path / f"grant-{secrets.token_hex(6)}"
            self._grant = path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._grant[1], fcntl.LOCK_EX)
        self._stated = self._granted + self._flying
        os.pwrite(self._grant[1], b"%020d" % self._stated, 0)

    def _make_room(self, size: int, unused_since: int | None) -> bool:
        """Evict copies until `size` more bytes fit; True if they do."""
        if size > self.max_bytes:
            return False
        copies: list[tuple[int, int, str]] = []
        excess = size - self.max_bytes
        for entry in os.scandir(self._path):
            if _GRANT.fullmatch(entry.name):
                excess += self._granted_to(Path(entry.path))
            elif _LOCK.fullmatch(entry.name):
                _removed(Path(entry.path))  # left by a process that was killed
            elif (taken := _taken(entry)) is not None:
                copies.append((*taken, entry.name))
                excess += taken[1]
        for used, taken_by, name in sorted(copies):
            if excess <= 0 or (unused_since is not None and used > unused_since):
                break
            if not name.endswith(".part") and self._evict(name):
                excess -= taken_by
        return excess <= 0

    def _granted_to(self, grant: Path) -> int:
        """Bytes granted to another process; 0, and the file is removed, if that process is dead."""
        if (self._grant is not None and grant == self._grant[0]) or _removed(grant):
            return 0
        try:
            return int(grant.read_bytes()[:20] or 0)
        except FileNotFoundError:
            return 0

    def _evict(self, copy: str) -> bool:
        return self._let_go(copy.partition(".")[0]) and _removed(self._path / copy)


def _taken(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """When a copy was used last, in ns, and its bytes; None if it is no copy. Removes abandoned files."""
    found = _COPY.fullmatch(entry.name)
    is_temporary = _TEMPORARY.fullmatch(entry.name) is not None
    # Anything else is a lock, or a foreign file in a folder that was not empty.
    if found is None and not is_temporary:
        return None
    kind = None if found is None else found[3]
    try:
        status = entry.stat()
        if (is_temporary or kind == "part") and time.time() - status.st_mtime > ABANDONED:
            Path(entry.path).unlink()
            return None
    except FileNotFoundError:
        return None  # dropped by another process
    if found is None:
        return None  # being written, and counted as granted
    taken = status.st_size
    if kind == "part":  # a partial file of the previous release, which reserves its full size
        taken = int(found[2])
    elif kind == "blocks":  # with holes
        taken = min(taken, 512 * status.st_blocks)
    return status.st_mtime_ns, taken


@contextmanager
def locked(path: Path, *, keep: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file, among all threads and processes; without `keep` it is removed afterwards."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(descriptor, path):  # not removed between the open and the lock
                try:
                    yield
                finally:
                    if not keep:
                        path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still names an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _removed(path: Path) -> bool:
    """Remove a file unless another descriptor holds a lock on it; True if it is gone."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
