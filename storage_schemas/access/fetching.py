"""Bytes of the files of one remote location: fetched ahead, many at a time, each once.

What a run will read is known before: it says so (`expect`, `fill`), and threads fetch it in this order:

1. what somebody waits for now (`read`), for which one request is always kept free;
2. ranges that are expected, in the order they were named, neighbours with one request;
3. the rest of files to be filled, in large requests; they have at least half of the requests.

With a cache everything goes through its copies (`blocks`), so ranges and whole files are one thing, and what another
process has fetched, or is fetching, is not fetched here. Without one, or once its disk fails, expected ranges wait in
memory until they are read; what is held there is bounded. Where a cache has no room a range is requested when it is
read. Threads begin with the work and end with it.

What is fetched ahead may fail: the reader asks again, and says what the server said. After a failure nothing is
fetched ahead for a while that doubles with each. A reader that waits for a minute says so.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import secrets
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np

from storage_schemas.access.blocks import BLOCK, BlockFile, Bytes, Folder
from storage_schemas.access.explaining import NoRanges
from storage_schemas.access.location import Location
from storage_schemas.errors import CorruptShard, UserError

if TYPE_CHECKING:
    from storage_schemas.access.cache import Cache

T = TypeVar("T")

REQUESTS = 16
AHEAD_BYTES = 256 * 2**20  # kept in memory, where there is no cache
LARGEST = 8 * 2**20  # bytes of a request
GAP = 16 * 2**10  # bytes between two ranges that are requested with them
SILENT_SECONDS = 60.0  # that a reader waits before it says so
POLL_SECONDS = 0.005  # between two looks at what another process is fetching
LONGEST_PAUSE = 60.0


class Range(NamedTuple):
    """Bytes [start, end) of a file, by its path in the location."""

    path: str
    start: int
    end: int


class NoDisk(Exception):  # noqa: N818 - a state, not a mistake
    """The disk of the cache has failed; it is said, and the cache is left alone."""


class _OfServer(Exception):  # noqa: N818 - carries another
    """Its argument is no failure of the disk, though it looks like one."""


class _Call:
    """Work that somebody waits for, and what came of it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work
        self.is_done = False
        self.result: Any = None
        self.error: BaseException | None = None


class Fetcher:
    """Fetches for one location, in one process; `fetcher_of` gives the one that all its readers share."""

    def __init__(
        self,
        location: Location,
        cache: Cache | None,
        *,
        requests: int = REQUESTS,
        ahead_bytes: int = AHEAD_BYTES,
    ) -> None:
        """Make one that fetches nothing yet.

        Args:
            location: not on this machine.
            cache: where copies are kept.
            requests: at a time.
            ahead_bytes: of expected ranges that are fetched and not read yet, without a cache.
        """
        self._location, self._copies = location, None if cache is None else cache.copies
        self._requests, self._ahead_bytes = requests, ahead_bytes
        self._changed = threading.Condition()
        self._sizes: dict[str, int] = {}
        self._inodes: dict[str, int] = {}  # of the copies that were read
        self._calls: deque[_Call] = deque()
        self._expected: dict[Range, None] = {}
        self._fills: deque[str] = deque()
        self._elsewhere: list[str] = []  # to be filled, and just being fetched by other processes
        self._active = {"call": 0, "expected": 0, "fill": 0}
        self._flying: set[Range] = set()
        self._pieces: dict[Range, Bytes] = {}
        self._held = 0  # bytes of the two
        self._began = time.time_ns()
        self._pause_until, self._pause = 0.0, 0.0
        self._has_ranges = True
        self._is_told = False  # what will be read
        self._closed = False
        _FETCHERS.add(self)

    # What readers call.

    def expect(self, ranges: Iterable[Range], sizes: Mapping[str, int]) -> None:
        """Queue ranges that will be read, in order of first use.

        Args:
            sizes: bytes of their files, as the artifact says.
        """
        with self._changed:
            self._is_told = True
            self._sizes.update(sizes)
            for item in ranges:
                if item.start < item.end and item not in self._flying and item not in self._pieces:
                    self._expected.setdefault(item)
            self._start_threads()

    def fill(self, paths: Iterable[str], sizes: Mapping[str, int]) -> None:
        """Queue the rest of files, in order of first use; without a cache nothing happens.

        Args:
            sizes: bytes of these files, as the artifact says.
        """
        with self._changed:
            self._is_told = True
            self._sizes.update(sizes)
            if self._disk is not None:
                known = {*self._fills, *self._elsewhere}
                self._fills.extend(path for path in dict.fromkeys(paths) if path not in known)
                self._start_threads()

    def forget_expected(self) -> None:
        """Take all that is queued, or waits in memory, for something that will not be read."""
        with self._changed:
            self._expected.clear()
            self._fills.clear()
            self._elsewhere.clear()
            self._held -= sum(len(piece) for piece in self._pieces.values())
            self._pieces.clear()

    def read(self, path: str, start: int, end: int, size: int | None = None) -> Bytes:
        """The bytes [start, end) of a file, as far as it has them; read-only.

        Args:
            size: bytes of the file, as the artifact says; asked of the server where nobody has said.

        Raises:
            FileNotFoundError: no such file.
            CorruptShard: it is shorter than `size`.
            DatamergeError: see `Location.sent`.
        """
        if self._disk is not None:
            try:
                if (found := self._from_disk(path, start, end, size)) is not None:
                    return found
            except NoDisk:
                pass
        return self._from_memory(Range(path, start, end))

    def read_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """What `Location.read` gives; a whole file of unknown size takes one request."""
        if start is None and end is None and path not in self._sizes and self._disk is not None:
            try:
                return self._wait_for(path, lambda: self._keep(path))
            except NoDisk:
                pass
        size = self._size(path)
        return self.read(path, start or 0, size if end is None else min(end, size), size).tobytes()

    def whole_path(self, path: str) -> str | None:
        """The complete copy of a file; None without a cache, and where it has no room."""
        if self._disk is None:
            return None
        try:
            size = self._size(path)
            if self._from_disk(path, 0, size, size) is None:
                return None
            with self._on_disk() as copies:
                file = copies.open(self._name(path), size)
                if file is None:
                    return None
                copies.finish(file)
                return str(file.path)
        except NoDisk:
            return None

    def forget(self, path: str) -> bool:
        """Drop the copy of a file; whether there was one."""
        with self._changed:
            self._sizes.pop(path, None)
            for item in [item for item in self._pieces if item.path == path]:
                self._held -= len(self._pieces.pop(item))
        if self._copies is None:
            return False
        return self._copies.forget(self._name(path), self._inodes.pop(path, None))

    def close(self) -> None:
        """Fetch nothing any more; requests on their way are waited for, as long as one may take without a byte."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while sum(self._active.values()):
                self._changed.wait(1.0)

    # Threads.

    def _start_threads(self) -> None:
        while (job := self._next()) is not None:
            thread = threading.Thread(
                target=_work, args=(weakref.ref(self), job), name="datamerge-fetch", daemon=True
            )
            thread.start()

    def _next(self) -> tuple[str, Callable[[], None]] | None:
        """The work that is due, and of what kind, if a request is free for it; the caller holds `_changed`."""
        if self._closed or sum(self._active.values()) >= self._requests:
            return None
        if self._calls:
            call = self._calls.popleft()
            return self._begin("call", lambda: self._answer(call))
        return self._next_ahead() if time.monotonic() >= self._pause_until else None

    def _next_ahead(self) -> tuple[str, Callable[[], None]] | None:
        """The same, of what nobody waits for."""
        most = max(1, self._requests - 1)
        if self._active["expected"] + self._active["fill"] >= most:
            return None
        may_expect = not self._fills or self._active["expected"] < max(1, most - most // 2)
        if self._expected and may_expect and (work := self._expected_work()) is not None:
            return self._begin("expected", work)
        if self._fills:
            path = self._fills.popleft()
            return self._begin("fill", lambda: self._fill(path))
        if self._elsewhere and not self._active["fill"]:
            return self._begin("fill", self._look_again)
        return None

    def _begin(self, kind: str, work: Callable[[], None]) -> tuple[str, Callable[[], None]]:
        self._active[kind] += 1
        return kind, work

    def _do(self, kind: str, work: Callable[[], None]) -> tuple[str, Callable[[], None]] | None:
        """Do some work; what is due next, for this thread."""
        try:
            work()
            self._pause = 0.0
        except NoDisk:
            pass
        except Exception:  # who reads it will be told
            with self._changed:
                if time.monotonic() >= self._pause_until:
                    self._pause = min(LONGEST_PAUSE, max(1.0, 2 * self._pause))
                    self._pause_until = time.monotonic() + self._pause
        with self._changed:
            self._active[kind] -= 1
            self._changed.notify_all()
            due = self._next()
            self._start_threads()
            return due

    # What somebody waits for.

    def _wait_for(self, path: str, work: Callable[[], T]) -> T:
        """The result of some work that a thread does, ahead of everything else."""
        call = _Call(work)
        patience = _Patience(f"{self._location.url}/{path}")
        with self._changed:
            self._calls.append(call)
            self._start_threads()
            while not call.is_done:
                patience.wait(self._changed)
        if call.error is not None:
            raise call.error
        return cast(T, call.result)

    def _answer(self, call: _Call) -> None:
        try:
            call.result = call.work()
        except BaseException as error:
            call.error = error
        call.is_done = True

    # Copies on a disk.

    @property
    def _disk(self) -> Folder | None:
        return None if self._copies is None or self._copies.failed else self._copies

    @contextmanager
    def _on_disk(self) -> Iterator[Folder]:
        """The copies, for work on the disk; its failures are said once."""
        copies = self._copies
        assert copies is not None
        try:
            yield copies
        except _OfServer as error:
            raise error.args[0] from None
        except OSError as error:
            copies.give_up(error, self._location.url)
            raise NoDisk from error

    @staticmethod
    def _of_server(request: Callable[[], T]) -> T:
        """The result of a request that is made amid work on the disk, which does not fail with it."""
        try:
            return request()
        except FileNotFoundError as error:
            raise _OfServer(error) from None

    def _name(self, path: str) -> str:
        return hashlib.sha256(f"{self._location.url}/{path}".encode()).hexdigest()

    def _size(self, path: str, size: int | None = None) -> int:
        if size is None:
            size = self._sizes.get(path)
        if size is None and self._disk is not None:
            with self._on_disk() as copies:
                whole = copies.open(self._name(path), None)
            size = None if whole is None else whole.size
        if size is None:
            size = self._wait_for(path, lambda: self._location.size(path))
        self._sizes[path] = size
        return size

    def _from_disk(self, path: str, start: int, end: int, size: int | None) -> Bytes | None:
        """Bytes of the copy, once they are there; None if there is no room for them."""
        size = self._size(path, size)
        end = min(end, size)
        patience = _Patience(f"{self._location.url}/{path}")
        while True:
            with self._on_disk() as copies:
                file = copies.open(self._name(path), size)
                assert file is not None
                file.touch()
            if start >= end or not file.missing(start, end):
                self._inodes[path] = file.inode
                return file.view[start:end]
            if not self._has_ranges:
                if not self._wait_for(path, lambda: self._download(path, size)):
                    return None
                continue
            if end - start > LARGEST:  # the other threads help
                with self._changed:
                    if path not in self._fills:
                        self._fills.appendleft(path)
            come = self._wait_for(path, functools.partial(self._fetch, file, path, *self._wanted(start, end, size)))
            if come is None:
                with copies.changed:
                    patience.wait(copies.changed, POLL_SECONDS)
                    file.refresh(start // BLOCK, -(-end // BLOCK))
            elif not come:
                return None

    def _wanted(self, start: int, end: int, size: int) -> tuple[int, int]:
        """What to fetch for a reader: if nobody has said what else will be read, what is around it."""
        if self._is_told or end - start > LARGEST:
            return start, end
        first = start // LARGEST * LARGEST
        return first, min(max(end, first + LARGEST), size)

    def _fetch(
        self, file: BlockFile, path: str, start: int, end: int, unused_since: int | None = None
    ) -> bool | None:
        """Fetch the first run of bytes [start, end) that is missing; None if others do, False if there is no room."""
        with self._on_disk() as copies:
            run = copies.claim(file, start, end, LARGEST)
        if run is None:
            return None
        first, end = run[0], min(run[1] * BLOCK, file.size)
        start, taken = first * BLOCK, end - first * BLOCK + run[1] - first  # with its marks
        try:
            with self._on_disk():
                if not copies.reserve(taken, unused_since):
                    return False
            try:
                data = self._get(path, start, end, strict=True)
                with self._on_disk():
                    file.write(first, data)
            except UserError as error:
                if not isinstance(error.__cause__, NoRanges):
                    raise
                self._has_ranges = False
            finally:
                copies.written(taken)
        finally:
            with self._on_disk():
                copies.release(file, run)
        return True

    def _get(self, path: str, start: int, end: int, *, strict: bool = False) -> bytes:
        """All of these bytes, of the server.

        Args:
            strict: more than these may not be sent.
        """
        data = self._location.sent(path, start, end, end - start if strict else None)
        if strict and len(data) != end - start:
            raise CorruptShard(
                f"{self._location.url}/{path}: expected {end - start} bytes at {start}, found {len(data)}; it is "
                "cut short"
            )
        return data

    def _download(self, path: str, size: int) -> bool:
        """Fetch a whole file, of a server that knows no ranges; False if there is no room for it."""
        name = self._name(path)
        with self._on_disk() as copies, copies.alone(name):
            if copies.open(name, None) is not None:
                return True
            if not copies.reserve(size):
                return False
            new = copies.path / f".{secrets.token_hex(6)}.tmp"
            try:
                self._of_server(lambda: self._location.download(path, new, size))
                copies.forget(name, None)
                new.replace(copies.path / name)
            finally:
                new.unlink(missing_ok=True)
                copies.written(size)
        return True

    def _keep(self, path: str) -> bytes:
        """A whole file, of the cache or of the server."""
        name = self._name(path)
        with self._on_disk() as copies:
            whole = copies.open(name, None)
            if whole is not None:
                whole.touch()
                self._inodes[path] = whole.inode
                return whole.view.tobytes()
            with copies.alone(name):
                whole = copies.open(name, None)
                if whole is not None:
                    self._inodes[path] = whole.inode
                    return whole.view.tobytes()
                data = self._of_server(lambda: self._location.sent(path, None, None))
                copies.put(name, data)
        return data

    def _fill(self, path: str) -> None:
        """Fetch the next part of a file that is missing."""
        size = self._sizes.get(path)
        if self._disk is None or size is None:
            return
        with self._on_disk() as copies:
            file = copies.open(self._name(path), size)
        if file is None or not file.missing(0, size):
            return
        if not self._has_ranges:
            self._download(path, size)
            return
        with self._changed:
            self._fills.appendleft(path)
            self._start_threads()  # of which the next takes the part after this one
        come = self._fetch(file, path, 0, size, self._began)
        if come:
            return
        with self._changed:
            if path in self._fills:
                self._fills.remove(path)
            if come is None and file.missing(0, size) and path not in self._elsewhere:
                self._elsewhere.append(path)

    def _look_again(self) -> None:
        """Queue once more what other processes were fetching: one that was killed has not."""
        with self._changed:
            self._changed.wait(0.2)
            self._fills.extend(self._elsewhere)
            self._elsewhere.clear()

    # Expected ranges.

    def _expected_work(self) -> Callable[[], None] | None:
        """The first expected ranges that are neighbours; None if there is no room for them in memory."""
        items: list[Range] = []
        for item in self._expected:
            if items and not (
                item.path == items[0].path
                and 0 <= item.start - items[-1].end <= GAP
                and item.end - items[0].start <= LARGEST
            ):
                break
            items.append(item)
        size = sum(item.end - item.start for item in items)
        on_disk = self._disk is not None
        if not on_disk and self._held and self._held + size > self._ahead_bytes:
            return None
        for item in items:
            del self._expected[item]
        if on_disk:
            return lambda: self._expected_to_disk(items)
        self._flying.update(items)
        self._held += size
        return lambda: self._expected_to_memory(items)

    def _expected_to_disk(self, items: list[Range]) -> None:
        path, start, end = items[0].path, items[0].start, items[-1].end
        size = self._sizes.get(path)
        if size is None or self._disk is None or not self._has_ranges:
            return
        with self._on_disk() as copies:
            file = copies.open(self._name(path), size)
        end = min(end, size)
        while file is not None and start < end and file.missing(start, end) and self._fetch(file, path, start, end):
            if not self._has_ranges:
                return

    def _expected_to_memory(self, items: list[Range]) -> None:
        start, pieces = items[0].start, {}
        try:
            data = np.frombuffer(self._get(items[0].path, start, items[-1].end), np.uint8)
            pieces = {item: data[item.start - start : item.end - start] for item in items}
        finally:
            with self._changed:
                self._flying.difference_update(items)
                self._held -= sum(item.end - item.start for item in items)
                self._pieces.update(pieces)
                self._held += sum(len(piece) for piece in pieces.values())

    def _from_memory(self, item: Range) -> Bytes:
        patience = _Patience(f"{self._location.url}/{item.path}")
        with self._changed:
            while item in self._flying:
                patience.wait(self._changed)
            piece = self._pieces.pop(item, None)
            if piece is not None:
                self._held -= len(piece)
                self._start_threads()
                return piece
            self._expected.pop(item, None)
            # What nobody has read must not keep out what is read.
            while self._pieces and self._held > self._ahead_bytes // 2:
                self._held -= len(self._pieces.pop(next(iter(self._pieces))))
        return np.frombuffer(self._wait_for(item.path, lambda: self._get(*item)), np.uint8)


class _Patience:
    """Waits, and says after every minute what for."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._began = time.monotonic()
        self._said = 0

    def wait(self, changed: threading.Condition, seconds: float = 1.0) -> None:
        """Wait for a notification, at most so long; the caller holds `changed`."""
        changed.wait(seconds)
        waited = time.monotonic() - self._began
        if waited // SILENT_SECONDS > self._said:
            self._said = int(waited // SILENT_SECONDS)
            warnings.warn(
                f"{self._where}: no answer for {waited:.0f} seconds; still waiting", RuntimeWarning, stacklevel=5
            )


def _work(fetcher: weakref.ref[Fetcher], job: tuple[str, Callable[[], None]] | None) -> None:
    """What a thread does: work until there is none, or until nobody has the fetcher any more."""
    while job is not None and (owner := fetcher()) is not None:
        job = owner._do(*job)
        del owner


_FETCHERS: weakref.WeakSet[Fetcher] = weakref.WeakSet()
_MAKING = threading.Lock()


def fetcher_of(location: Location) -> Fetcher:
    """The fetcher of a remote location, in this process."""
    with _MAKING:
        made: tuple[int, Fetcher] | None = vars(location).get("_fetcher")
        if made is None or made[0] != os.getpid():
            made = os.getpid(), Fetcher(location, getattr(location, "cache", None))
            vars(location)["_fetcher"] = made
        return made[1]


def _stop() -> None:
    """Begin no request while the interpreter ends."""
    for fetcher in list(_FETCHERS):
        fetcher._closed = True


def _after_fork() -> None:
    global _MAKING
    _MAKING = threading.Lock()
    _FETCHERS.clear()


atexit.register(_stop)
os.register_at_fork(after_in_child=_after_fork)
