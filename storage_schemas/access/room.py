"""The byte limit of a cache's folder, kept by all processes together.

A process is granted bytes before it writes them, many at a time, in a `grant-…` file that it keeps locked; those of
the dead are void. Bytes that were granted and are written may count twice for a while, so that the limit is never
passed. To make room the least recently used copies are evicted that nobody has open.
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

# A process is granted that many bytes at a time, or this part of the limit.
LARGEST_GRANT, GRANTS = 256 * 2**20, 64
REFUSED_SECONDS = 1.0  # before a full cache is looked through again
ABANDONED = 3600  # seconds after which a file that was being written is taken for left behind

_COPY = re.compile(r"([0-9a-f]{64})(?:\.(\d+)\.(blocks|part))?")
_GRANT = re.compile(r"grant-[0-9a-f]{12}")
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}\.tmp")


class Room:
    """What this process may write into the folder of a cache."""

    def __init__(self, path: Path, max_bytes: int, let_go: Callable[[str], bool]) -> None:
        """Make one that may write nothing yet.

        Args:
            path: of the folder.
            max_bytes: of all copies in it.
            let_go: closes this process's own copy of a name; False if it is being fetched.
        """
        self._path, self.max_bytes, self._let_go = path, max_bytes, let_go
        self._lock = threading.Lock()
        self._grant: tuple[Path, int] | None = None
        self._granted = self._flying = self._said = 0  # bytes; the last are those in the file
        self._refused = {True: 0.0, False: 0.0}  # until when, by whether any copy may be evicted

    @contextmanager
    def reserved(self, size: int, unused_since: int | None = None) -> Iterator[bool]:
        """While so many bytes are written: whether they may be.

        Args:
            unused_since: only copies that nobody has used since may be evicted for them, ns; None for any.

        Raises:
            OSError: the disk.
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
                    if self._granted + self._flying <= self._said // 2:  # what is written counts as that alone
                        with locked(self._path / "lock-space"):
                            self._write_grant()

    def is_full(self, unused_since: int | None = None) -> bool:
        """Whether there was just now no room, for anything: a question that costs nothing."""
        return not self._granted and self._is_refused(unused_since)

    def _is_refused(self, unused_since: int | None) -> bool:
        # Where any copy may be evicted and there is no room, there is none for those who ask for less.
        refused = max(until for kind, until in self._refused.items() if kind or unused_since is not None)
        return time.monotonic() < refused

    def _ask(self, size: int, unused_since: int | None) -> bool:
        self._path.mkdir(parents=True, exist_ok=True)
        with locked(self._path / "lock-space"):
            for wanted in (max(size, min(LARGEST_GRANT, self.max_bytes // GRANTS)), size):
                if self._make_room(wanted + self._flying, unused_since):
                    self._granted = wanted
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
        self._said = self._granted + self._flying
        os.pwrite(self._grant[1], b"%020d" % self._said, 0)

    def _make_room(self, size: int, unused_since: int | None) -> bool:
        """Evict copies until so many more bytes fit; whether they do."""
        if size > self.max_bytes:
            return False
        copies: list[tuple[int, int, str]] = []
        excess = size - self.max_bytes
        for entry in os.scandir(self._path):
            if _GRANT.fullmatch(entry.name):
                excess += self._granted_to(Path(entry.path))
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
        """Bytes granted to another process; a dead one's are void."""
        if self._grant is not None and grant == self._grant[0]:
            return 0
        try:
            descriptor = os.open(grant, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            if _is_free(descriptor):
                grant.unlink(missing_ok=True)
                return 0
            return int(os.pread(descriptor, 20, 0) or 0)
        finally:
            os.close(descriptor)

    def _evict(self, copy: str) -> bool:
        if not self._let_go(copy.partition(".")[0]):
            return False
        try:
            descriptor = os.open(self._path / copy, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            if not _is_free(descriptor):
                return False
            (self._path / copy).unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)


def _taken(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """When a copy was used last, ns, and its bytes; None for what is none, or was left behind and is removed."""
    found = _COPY.fullmatch(entry.name)
    is_temporary = _TEMPORARY.fullmatch(entry.name) is not None
    # Else a lock, or a file of somebody else, who chose a folder that was not empty.
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
    if kind == "part":  # of the previous release, which counts what is still to come
        taken = int(found[2])
    elif kind == "blocks":  # with holes
        taken = min(taken, 512 * status.st_blocks)
    return status.st_mtime_ns, taken


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Be the only one here, of all threads and processes."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_free(descriptor: int) -> bool:
    """Whether nobody else has a lock on this file; the caller has it now, until it closes the descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
