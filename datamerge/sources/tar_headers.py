"""The files in a tar by their headers, without an object for each.

Headers of a tar differ in name, size and time; the rest is mostly that of the header before. So a header is taken
without `tarfile` where it is one that `tarfile` has read, but for those fields, and its checksum is right. Everything
else goes to `tarfile`, a member at a time: pax headers that say more than times, long names, links, folders, sparse
files, large sizes, the end, and damage.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import adler32

NAMES = "backslashreplace"  # of bytes in a member's name that are no text
MAX_MEMBER = 2**36  # bytes of any member; tarfile would seek beyond what file systems allow
ENCODING = tarfile.ENCODING
BLOCK = tarfile.BLOCKSIZE
REGULAR, EXTENDED = tarfile.REGTYPE[0], tarfile.XHDTYPE[0]
# Name; mode and owner; size; time; checksum; kind and the rest.
_FIELDS = struct.Struct("100s24s12s12s8s356s")
_BEFORE_CHECKSUM = 148
_SPACES = 8 * ord(" ")  # in place of the checksum where it is computed
_PREFIX = slice(345 - 156, 500 - 156)  # of the name, in the rest
_TIME = re.compile(rb"(\d{1,4}) [acm]time=[\d.]+\n")
# Bytes of a local tar read at a time: the headers around a label, but little of an image.
WINDOW = 4096


class File(NamedTuple):
    """A file in a tar.

    Attributes:
        name: path inside.
        start, size: where its content is.
        problem: why the content cannot be used; mostly empty.
    """

    name: str
    start: int
    size: int
    problem: str = ""


class _Kind:
    """What headers of one kind have besides name, size and time."""

    def __init__(self, owner: bytes, time: bytes, rest: bytes) -> None:
        self.owner, self.time, self.rest = owner, time, rest
        self.more = sum(rest) + _SPACES - 1  # to make a checksum of an Adler sum, which begins at 1
        prefix = rest[_PREFIX].partition(b"\0")[0]
        self.prefix = f"{_text(prefix)}/" if prefix else ""


class TarFiles:
    """The files of a tar in its order.

    Args:
        stream: of the tar, from its beginning; every read may be a request where it is not local.
        is_local: whether to read around the stream.
    """

    def __init__(self, stream: Any, is_local: bool) -> None:
        self._stream = stream
        self._local = stream.fileno() if is_local else None
        self._size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        self._window, self._first, self._after = b"", 0, 0
        self._kinds: dict[int, _Kind] = {}

    def __iter__(self) -> Iterator[File]:
        """Its files; links, folders and others are left out.

        Raises:
            tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError: damage.
        """
        offset: int | None = 0
        while offset is not None:
            yield from self._plain(offset)
            if self._after > self._size:
                raise tarfile.ReadError("unexpected end of data")
            found, offset = self._unusual(self._after)
            if found is not None:
                yield found

    def content(self, file: File) -> bytes:
        """What is in a file."""
        data = self._read(file.start, file.size)
        if len(data) < file.size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _plain(self, offset: int) -> Iterator[File]:
        """Files whose headers are of known kinds, from here on; then `_after` is where others begin."""
        kinds, unpack = self._kinds, _FIELDS.unpack_from
        header = offset  # that of the file itself; `offset` may be that of an extended one
        while True:
            self._after = offset
            at = header - self._first
            if not 0 <= at <= len(self._window) - BLOCK:
                self._look(header)
                at = 0
                if len(self._window) < BLOCK:
                    return
            window = self._window
            name, owner, size_, time, checksum, rest = unpack(window, at)
            kind = kinds.get(rest[0])
            if kind is None or rest != kind.rest or owner != kind.owner:
                kind = self._learn(window[at : at + BLOCK])
                if kind is None:
                    return
            try:
                if time != kind.time:
                    _octal(time)
                    kind.time = time
                size = _octal(size_)
                total = int(checksum[:6], 8)
            except ValueError:
                return
            head = window[at : at + _BEFORE_CHECKSUM]
            if size < 0 or checksum[6:] != b"\0 " or (adler32(head) & 0xFFFF) + kind.more != total:
                return
            if rest[0] == EXTENDED:
                if header != offset or not 0 < size <= BLOCK or not _are_times(self._read(header + BLOCK, BLOCK)):
                    return
                header += 2 * BLOCK
                continue
            start = header + BLOCK
            yield File(kind.prefix + name.partition(b"\0")[0].decode(ENCODING, NAMES), start, size)
            header = offset = start + -(-size // BLOCK) * BLOCK

    def _learn(self, block: bytes) -> _Kind | None:
        """Remember of which kind a header is, if it is a file's or extended, and `tarfile` finds no fault with it."""
        _, owner, _, time, _, rest = _FIELDS.unpack(block)
        if rest[0] not in (REGULAR, EXTENDED):
            return None
        try:
            tarfile.TarInfo.frombuf(block, ENCODING, NAMES)
        except tarfile.HeaderError:
            return None
        self._kinds[rest[0]] = kind = _Kind(owner, time, rest)
        return kind

    def _unusual(self, offset: int) -> tuple[File | None, int | None]:
        """The member whose headers begin here, if it is a file, and where the next one is; None at the end."""
        self._stream.seek(offset)
        with tarfile.open(fileobj=self._stream, mode="r:", errors=NAMES) as tar:
            info = tar.next()
            if info is None:
                return None, None
            after = tar.offset
        if not info.offset < after < info.offset + MAX_MEMBER:
            raise ValueError(f"{info.name!r} claims {info.size} bytes")  # negative, never ends, or absurd
        if not info.isfile():
            return None, after
        problem = ""
        if info.issparse():
            problem = "is sparse; make the tar without --sparse"
        elif not 0 <= info.size <= after - info.offset_data:
            problem = f"claims {info.size} bytes at {info.offset_data}, next is {after}"
        return File(info.name, info.offset_data, info.size, problem), after

    def _read(self, start: int, size: int) -> bytes:
        at = start - self._first
        if 0 <= at <= len(self._window) - size:
            return self._window[at : at + size]
        if self._local is not None:
            return os.pread(self._local, size, start)
        self._stream.seek(start)
        data: bytes = self._stream.read(size)
        return data

    def _look(self, offset: int) -> None:
        """Move the window to a header."""
        self._first, self._window = offset, b""
        self._window = self._read(offset, BLOCK if self._local is None else WINDOW)


def _octal(field: bytes) -> int:
    """A number as nearly all tars have it; raises ValueError for other ways."""
    if field[11] not in b"\0 ":
        raise ValueError(field)
    return int(field[:11], 8)


def _text(name: bytes) -> str:
    return name.decode(ENCODING, NAMES)


def _are_times(block: bytes) -> bool:
    """Whether a pax header says when a file was written or read, and nothing else."""
    place = 0
    while found := _TIME.match(block, place):
        if int(found[1]) != found.end() - place:
            return False
        place = found.end()
    return place > 0 and not block[place:].strip(b"\0")
