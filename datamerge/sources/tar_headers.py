"""Lists the files of tars from their headers, many times as fast as `tarfile`. F files.

The place of a header depends on the size in the one before. So a loop in Python follows the headers that look plain
and does no more than that; then hundreds of them are checked at once. At the first that is not plain, `tarfile` reads
one member, and the loop goes on after it: pax headers with more than times, long names, links, folders, sparse files,
large sizes, the end, damage.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.tar_blocks import (
    BLOCK,
    NAME,
    NAMES,
    SIZE,
    Blocks,
    HeaderChecks,
    Rows,
    are_times,
    as_name,
    coded_rows,
    names_of,
)

# Exceptions of tarfile for files that are no tars, or malicious.
BROKEN = (tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError)
MAX_MEMBER = 2**36  # bytes; for larger members tarfile would seek beyond the limits of file systems
REGULAR, EXTENDED = tarfile.REGTYPE[0], tarfile.XHDTYPE[0]
# Bytes to read at a time: enough for the headers around a label, but little of an image.
WINDOW = 4096
# Number of windows whose headers are checked at once: most fit into a processor's cache; fewer follow headers that
# were not plain, as all behind those are read again.
FEWEST, MOST = 16, 1024
# Where fewer files than this are plain, tarfile reads more and more members, up to the second number, before the next
# attempt.
FEW, MOST_UNUSUAL = 4, 64
_TYPE, _MAGIC = 156, 257
_MAGIC_BYTE = ord("u")  # of `ustar`


class File(NamedTuple):
    """A file in a tar.

    Attributes:
        name: path inside the tar.
        start, size: byte offset and size of its content.
        problem: why the content cannot be used; usually empty.
    """

    name: str
    start: int
    size: int
    problem: str = ""


@dataclass(frozen=True, eq=False)
class TarFiles:
    """The files of a tar as columns, in order.

    Attributes:
        names: paths inside the tar, Arrow large strings [F].
        starts, sizes: int64 [F], byte offset and size of each content.
        small: contents of most files that are no larger than a block, else null, Arrow large binary [F].
        problems: why a content cannot be used, by index of the file.
        damage: what is wrong with the tar after these files; None if they are all.
        read: reads a content from its offset and size; raises tarfile.ReadError if the tar is truncated.
    """

    names: pa.LargeStringArray
    starts: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    small: pa.LargeBinaryArray
    problems: dict[int, str]
    damage: Exception | None
    read: Callable[[int, int], bytes]

    def contents(self, rows: Rows) -> pa.LargeBinaryArray:
        """The contents of the files at these rows; errors are those of `read`."""
        found = self.small.take(pa.array(rows))
        if not found.null_count:
            return found
        texts = found.to_pylist()
        for place in np.flatnonzero(found.is_null()).tolist():
            texts[place] = self.read(int(self.starts[rows[place]]), int(self.sizes[rows[place]]))
        return pa.array(texts, pa.large_binary())


class TarLister:
    """Lists tars one after the other.

    Args:
        wants: whether the content of a file of this name and size is going to be read. Of a tar that is not local, it
            is read when its header is, as going back may be another request.
    """

    def __init__(self, wants: Callable[[str, int], bool]) -> None:
        self._wants = wants
        self._checks = HeaderChecks()
        self._buffer = bytearray(MOST * WINDOW)
        self._blocks = np.frombuffer(self._buffer, np.uint8).reshape(-1, BLOCK)
        whole = memoryview(self._buffer)
        self._views = [[whole[start : start + WINDOW]] for start in range(0, len(whole), WINDOW)]

    def files(self, stream: Any, is_local: bool) -> TarFiles:
        """List the files of a tar up to its end, or to damage.

        Args:
            stream: the tar; if it is not local, every read may be a request.
            is_local: whether the stream has a file descriptor to read from directly.
        """
        tar = _Tar(stream, is_local, self._wants)
        collected, damage = _Collected(), None
        try:
            self._collect(tar, collected)
        except BROKEN as error:
            damage = error
        return collected.files(damage, tar.read)

    def _collect(self, tar: _Tar, collected: _Collected) -> None:
        """Collect the files of a tar; raises one of `BROKEN` if it is damaged."""
        offset: int | None = 0
        # What is read behind damage is wasted, and may be large where images are fetched with it.
        most = MOST if tar.is_local else FEWEST
        windows, waiting, unusual = most, 0, 0
        while offset is not None:
            if waiting:
                waiting -= 1
            else:
                followed = self._follow(tar, offset, windows)
                found, offset = self._check(tar, followed, collected)
                windows = min(max(2 * found, FEWEST), most)
                if followed.is_whole and found == sum(map(len, followed.layouts)):
                    continue
                waiting = unusual = 0 if found >= FEW else min(2 * unusual + 1, MOST_UNUSUAL)
            if offset > tar.size:
                raise tarfile.ReadError("unexpected end of data")
            file, offset = tar.unusual(offset)
            if file is not None:
                collected.add(file)
                if not tar.is_local:
                    tar.keep(file.name, file.start, file.size)

    def _follow(self, tar: _Tar, offset: int, windows: int) -> _Followed:
        """Read headers that look plain from `offset` on into the buffer. They may turn out to be anything."""
        buffer, read, keep = self._buffer, tar.read_into, None if tar.is_local else tar.keep
        followed = _Followed([], [])
        add_offset, add_layout = followed.offsets.append, followed.layouts.append
        layout, magic, first, stop, after = list[int](), 0, 0, 0, 0
        try:
            for base, view in zip(range(0, windows * WINDOW, WINDOW), self._views, strict=False):
                add_offset(offset)
                found = read(view, offset)
                if found < WINDOW:
                    buffer[base + found : base + WINDOW] = bytes(WINDOW - found)
                # Mostly the headers are at the places of those in the window before; `_check` looks at all of them.
                if magic and buffer[base + magic] == _MAGIC_BYTE:
                    size = int(buffer[base + first : base + stop], 8)
                    if size > WINDOW:
                        add_layout(layout)
                        offset += after + (size - 1 & -BLOCK)
                        continue
                layout, at, last = [], base, base + WINDOW - 2 * BLOCK
                add_layout(layout)
                while at <= last:  # a header and the block after it
                    header = at
                    if buffer[at + _TYPE] == EXTENDED:
                        header += 2 * BLOCK
                        if header > last:
                            break
                    size = int(buffer[header + SIZE.start : header + SIZE.stop - 1], 8)
                    if buffer[header + _TYPE] != REGULAR or size < 0:
                        return followed
                    layout.append(at - base)
                    place = header - base
                    at = header + 2 * BLOCK + (size - 1 & -BLOCK)
                    if keep is not None and size > BLOCK:
                        name = as_name(bytes(buffer[header : header + NAME.stop]))
                        keep(name, offset + header + BLOCK - base, size)
                offset += at - base
                if keep is None:
                    magic, after = place + _MAGIC, place + 2 * BLOCK
                    first, stop = place + SIZE.start, place + SIZE.stop - 1
        except ValueError:  # not a number
            return followed
        return followed._replace(is_whole=True)

    def _check(self, tar: _Tar, followed: _Followed, collected: _Collected) -> tuple[int, int]:
        """Collect the files before the first header that is not plain; returns their number and the offset there."""
        blocks, (members, shifts) = self._blocks, followed.members()
        if not len(members):
            return 0, followed.offsets[0]
        is_extended = blocks[members, _TYPE] == EXTENDED
        places, extended = members + 2 * is_extended, members[is_extended]
        headers, coded = blocks[places], coded_rows(blocks[extended])  # extended headers are often the same
        distinct = np.frombuffer(b"".join(coded.dictionary.to_pylist()), np.uint8).reshape(-1, BLOCK)
        good, sizes, kinds = self._checks.check(np.concatenate([headers, distinct]))
        (good, more), (sizes, lengths) = np.split(good, [len(headers)]), np.split(sizes, [len(headers)])
        more &= (lengths > 0) & (lengths <= BLOCK)
        good[is_extended] &= more[coded.indices.to_numpy()] & are_times(blocks[extended + 1])
        starts = shifts + (places + 1) * BLOCK
        ends = starts - -sizes // BLOCK * BLOCK
        good &= (headers[:, _TYPE] == REGULAR) & (starts <= tar.size)  # a header at the end may be truncated
        good[1:] &= ends[:-1] == (shifts + members * BLOCK)[1:]
        found = len(good) if good.all() else int(good.argmin())
        if not found:
            return 0, followed.offsets[0]
        starts, sizes = starts[:found], sizes[:found]
        small = _small(blocks, places[:found] + 1, sizes)
        collected.extend(names_of(headers[:found], kinds), starts, sizes, small)
        return found, int(ends[found - 1])


class _Followed(NamedTuple):
    """Members of which nothing is checked.

    Attributes:
        offsets: offset in the tar of each window.
        layouts: for each window but the last, which may have none, where in it members begin; often the same list.
        is_whole: whether no other header came up.
    """

    offsets: list[int]
    layouts: list[list[int]]
    is_whole: bool = False

    def members(self) -> tuple[Rows, Rows]:
        """By member, the index of its first block in the buffer, and the offset in the tar of the buffer's begin."""
        counts = list(map(len, self.layouts))
        bases = WINDOW * np.arange(len(counts))
        shifts = np.array(self.offsets[: len(counts)]) - bases
        places = np.fromiter(chain.from_iterable(self.layouts), np.int64) + np.repeat(bases, counts)
        return places // BLOCK, np.repeat(shifts, counts)


class _Collected:
    """Collects the files of a tar."""

    def __init__(self) -> None:
        self._columns: list[tuple[Any, ...]] = []
        self._files: list[File] = []
        self._problems: dict[int, str] = {}
        self._count = 0

    def extend(self, *columns: Any) -> None:
        """Add files: names, starts, sizes, small contents."""
        self._flush()
        self._columns.append(columns)
        self._count += len(columns[0])

    def add(self, file: File) -> None:
        """Add a file."""
        if file.problem:
            self._problems[self._count + len(self._files)] = file.problem
        self._files.append(file)

    def files(self, damage: Exception | None, read: Callable[[int, int], bytes]) -> TarFiles:
        """All files."""
        self._flush()
        names, starts, sizes, small = zip(*self._columns, strict=True)
        return TarFiles(
            pa.concat_arrays(names),
            np.concatenate(starts),
            np.concatenate(sizes),
            pa.concat_arrays(small),
            self._problems,
            damage,
            read,
        )

    def _flush(self) -> None:
        """Turn single files into columns."""
        if self._columns and not self._files:
            return
        names, starts, sizes, _ = zip(*self._files, strict=True) if self._files else ((),) * 4
        numbers = (np.array(starts, np.int64), np.array(sizes, np.int64))
        self._columns.append((pa.array(names, pa.large_string()), *numbers, pa.nulls(len(names), pa.large_binary())))
        self._count += len(names)
        self._files = []


class _Tar:
    """Reads from a tar."""

    def __init__(self, stream: Any, is_local: bool, wants: Callable[[str, int], bool]) -> None:
        self.is_local = is_local
        self._wants = wants
        self.size: int = stream.seek(0, os.SEEK_END)
        self._stream = stream
        self._local = stream.fileno() if is_local else None
        self.read_into = self._read_into if self._local is None else partial(os.preadv, self._local)
        self._kept: dict[int, bytes] = {}

    def read(self, start: int, size: int) -> bytes:
        """Read a content; raises tarfile.ReadError if the tar is truncated."""
        data = self._kept[start] if start in self._kept else self._read(start, size)
        if len(data) < size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def keep(self, name: str, start: int, size: int) -> None:
        """Read the content of a file, if `read` is going to be asked for it."""
        if self._wants(name, size):
            self._kept[start] = self._read(start, size)

    def unusual(self, offset: int) -> tuple[File | None, int | None]:
        """Read a member with `tarfile`: returns it if it is a file, and the offset of the next, None at the end."""
        self._stream.seek(offset)
        with tarfile.open(fileobj=self._stream, mode="r:", errors=NAMES) as tar:
            info = tar.next()
            if info is None:
                # `tarfile` also takes a damaged header for the end, and would leave out all files behind it.
                if self._read(offset, BLOCK).strip(b"\0"):
                    raise tarfile.ReadError(f"the header at byte {offset} is damaged; make the tar again")
                return None, None
            after = tar.offset
        if not info.offset < after < info.offset + MAX_MEMBER:
            raise ValueError(f"{info.name!r} claims {info.size} bytes")  # negative, endless, or absurd
        if not info.isfile():
            return None, after
        problem = ""
        if info.issparse():
            problem = "is sparse; make the tar without --sparse"
        elif not 0 <= info.size <= after - info.offset_data:
            problem = f"claims {info.size} bytes at {info.offset_data}, next is {after}"
        return File(info.name, info.offset_data, info.size, problem), after

    def _read(self, start: int, size: int) -> bytes:
        if self._local is not None:
            return os.pread(self._local, size, start)
        self._stream.seek(start)
        data: bytes = self._stream.read(size)
        return data

    def _read_into(self, views: list[memoryview], offset: int) -> int:
        room = min(max(self.size - offset, 0), len(views[0]))
        self._stream.seek(offset)
        # At the end of its file a buffered reader would forget what it holds.
        found: int = self._stream.readinto(views[0][:room]) if room else 0
        return found


def _small(blocks: Blocks, rows: Rows, sizes: npt.NDArray[np.int64]) -> pa.LargeBinaryArray:
    """The contents in these blocks, null for those that are larger."""
    is_small = sizes <= BLOCK
    lengths = np.where(is_small, sizes, 0)
    width = lengths.max()
    data = blocks[:, :width][rows[is_small]][np.arange(width) < lengths[is_small, None]]
    ends = np.concatenate([[0], np.cumsum(lengths)])
    buffers = [pa.array(is_small).buffers()[1], pa.py_buffer(ends), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(rows), buffers)
