"""One local copy of a remote file, complete or not; `folder` describes how copies are stored and shared."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

BLOCK = 4096  # bytes; the page size of sparse files, and small enough to fetch little beyond a request
# Bytes written at a time, at multiples of them: Linux keeps such writes in large pages, which are read faster through
# a map than the small pages of writes of any size.
UNIT = 2**20


class BlockFile:
    """An open copy, complete or not. `Folder.changed` guards the state that threads share."""

    def __init__(self, name: str, size: int, descriptor: int, path: Path) -> None:
        self.name, self.size, self.path = name, size, path
        self._descriptor = descriptor
        self.inode = os.fstat(descriptor).st_ino
        # The map duplicates the descriptor, so the shared lock lasts as long as any view.
        self.view: Bytes = (
            np.frombuffer(mmap.mmap(descriptor, size, access=mmap.ACCESS_READ), np.uint8)
            if size
            else np.empty(0, np.uint8)
        )
        self._here = bytearray(-(-size // BLOCK))
        self.here = np.frombuffer(self._here, np.bool_)
        self.busy = np.zeros(len(self.here), np.bool_)  # being fetched by this process
        self._complete = False
        self.refresh(0, len(self.here))

    def refresh(self, first: int, last: int) -> None:
        """Read the marks of blocks [first, last) that other processes have set."""
        marks = os.pread(self._descriptor, last - first, self.size + first)
        if marks:
            self.here[first:last] |= np.frombuffer(marks, np.bool_)[: last - first]
        else:  # the marks were cut off, so all blocks are present
            self.here[:] = True

    @property
    def is_complete(self) -> bool:
        """Whether all blocks are known to be present in this process."""
        self._complete = self._complete or 0 not in self._here
        return self._complete

    def missing(self, start: int, end: int, *, or_coming: bool = False) -> bool:
        """Whether any of the bytes [start, end) is not known to be present in this process.

        Args:
            or_coming: count bytes that this process is fetching as present.
        """
        if self._complete:
            return False
        first, last = start // BLOCK, -(-end // BLOCK)
        if self._here.find(0, first, last) < 0:  # faster than numpy, and every read of a record asks
            return False
        return not (or_coming and (self.here[first:last] | self.busy[first:last]).all())

    def write(self, first: int, pieces: Iterable[bytes | memoryview]) -> None:
        """Write consecutive pieces to the blocks from `first` on, and set the mark of each block once it is whole."""
        at = end = first * BLOCK
        waiting: list[memoryview] = []
        for piece in pieces:
            view = memoryview(piece).cast("B")
            while view:
                waiting.append(view[: UNIT - end % UNIT])
                end, view = end + len(waiting[-1]), view[len(waiting[-1]) :]
                if end % UNIT == 0:
                    at = self._write(at, waiting)
                    waiting = []
        self._write(at, waiting)

    def _write(self, at: int, views: list[memoryview]) -> int:
        """Write views from the byte `at` on, a multiple of `BLOCK`; returns the byte after them."""
        first = at // BLOCK
        while views:
            written = os.pwritev(self._descriptor, views, at)
            at += written
            while views and written >= len(views[0]):
                written -= len(views.pop(0))
            if views:
                views[0] = views[0][written:]
        last = -(-at // BLOCK) if at == self.size else at // BLOCK
        os.pwrite(self._descriptor, bytes([1]) * (last - first), self.size + first)
        self.here[first:last] = True
        return at

    @property
    def is_kept(self) -> bool:
        """Whether the copy is still in its folder: neither evicted nor dropped by another process."""
        return os.fstat(self._descriptor).st_nlink > 0

    def touch(self) -> None:
        """Record that the copy is used now, as its mtime: many machines do not keep access times."""
        os.utime(self._descriptor)

    def cut(self) -> None:
        """Cut the marks off."""
        os.ftruncate(self._descriptor, self.size)

    def __del__(self) -> None:
        if (descriptor := vars(self).pop("_descriptor", None)) is not None:
            os.close(descriptor)
