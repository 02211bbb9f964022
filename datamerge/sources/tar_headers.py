"""Lists the files of a tar from its headers, several times as fast as `tarfile`.

Headers in one tar mostly differ in name, size and time only. So `tarfile` parses one header of each kind, and headers
that equal it in all other fields and have a correct checksum are read without it. All others go to `tarfile`, member
by member: pax headers with more than times, long names, links, folders, sparse files, large sizes, the end, damage.
"""

from __future__ import annotations

import os
import re
import struct
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple
from zlib import adler32

NAMES = "backslashreplace"  # for bytes in names that are not UTF-8
MAX_MEMBER = 2**36  # bytes; for larger members tarfile would seek beyond the limits of file systems
ENCODING = tarfile.ENCODING
BLOCK = tarfile.BLOCKSIZE
REGULAR, EXTENDED = tarfile.REGTYPE[0], tarfile.XHDTYPE[0]
# Name; mode and owner; size; time; checksum; type flag and the rest.
_FIELDS = struct.Struct("100s24s12s12s8s356s")
_BEFORE_CHECKSUM = 148
_SPACES = 8 * ord(" ")  # the checksum is computed with spaces in its own field
_PREFIX = slice(345 - 156, 500 - 156)  # prefix of the name, in the rest
_TIME = re.compile(rb"(\d{1,4}) [acm]time=[\d.]+\n")
# Bytes of a local tar to read at a time: enough for the headers around a label, but little of an image.
WINDOW = 4096


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


class _Kind:
    """The fields that headers of one kind share: all but name, size and time."""

    def __init__(self, owner: bytes, time: bytes, rest: bytes) -> None:
        self.owner, self.time, self.rest = owner, time, rest
        self.more = sum(rest) + _SPACES - 1  # turns an Adler sum, which begins at 1, into the checksum
        prefix = rest[_PREFIX].partition(b"\0")[0]
        self.prefix = f"{_text(prefix)}/" if prefix else ""


class TarFiles:
    """Iterates over the files of a tar, in order.

    Args:
        stream: the tar, at its beginning; if it is not local, every read may be a request.
        is_local: whether the stream has a file descriptor to read from directly.
    """

    def __init__(self, stream: Any, is_local: bool) -> None:
        self._stream = stream
        self._local = stream.fileno() if is_local else None
        self._size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        self._window, self._first, self._after = b"", 0, 0
        self._kinds: dict[int, _Kind] = {}

    def __iter__(self) -> Iterator[File]:
        """Yield the regular files.

        Raises:
            tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError: the tar is damaged.
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
        """The content of a file.

        Raises:
            tarfile.ReadError: the tar is truncated.
        """
        data = self._read(file.start, file.size)
        if len(data) < file.size:
            raise tarfile.ReadError("unexpected end of data")
        return data

    def _plain(self, offset: int) -> Iterator[File]:
        """Yield files from `offset` on while their headers are of known kinds; `_after` is the offset after them."""
        kinds, unpack = self._kinds, _FIELDS.unpack_from
        header = offset  # of the file itself; `offset` may be that of its extended header
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
        """Remember the kind of a header, if it is a regular or extended one that `tarfile` accepts."""
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
        """Read a member with `tarfile`: returns it if it is a file, and the offset of the next, None at the end."""
        self._stream.seek(offset)
        with tarfile.open(fileobj=self._stream, mode="r:", errors=NAMES) as tar:
            info = tar.next()
            if info is None:
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
    """A number in the usual octal form; raises ValueError for other forms."""
    if field[11] not in b"\0 ":
        raise ValueError(field)
    return int(field[:11], 8)


def _text(name: bytes) -> str:
    return name.decode(ENCODING, NAMES)


def _are_times(block: bytes) -> bool:
    """Whether a pax header holds times and nothing else."""
    place = 0
    while found := _TIME.match(block, place):
        if int(found[1]) != found.end() - place:
            return False
        place = found.end()
    return place > 0 and not block[place:].strip(b"\0")
