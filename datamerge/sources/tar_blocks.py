"""Checks many headers of tars at once. A header is a block of 512 bytes; N headers.

Headers in one tar mostly differ in name, size, time and checksum only. So `tarfile` parses one header of each kind,
and those that equal it in all other fields need only octal numbers and a correct checksum.
"""

from __future__ import annotations

import re
import tarfile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.naming import joined

BLOCK = tarfile.BLOCKSIZE
ENCODING = tarfile.ENCODING
NAMES = "backslashreplace"  # for bytes in names that are not UTF-8
NAME, SIZE, TIME, CHECKSUM = slice(0, 100), slice(124, 136), slice(136, 148), slice(148, 156)
_SUMMED = slice(0, CHECKSUM.start)  # the fields that differ, and the owner
_OWNER, _REST = slice(NAME.stop, SIZE.start), slice(CHECKSUM.stop, BLOCK)
_OWNER_BYTES = _OWNER.stop - _OWNER.start
_PREFIX = slice(345, 500)  # of the name
_SPACES = 8 * ord(" ")  # the checksum is computed with spaces in its own field
_RECORD = 32  # bytes that a record with one time fits into
_TIME = re.compile(rb"(\d{1,4}) [acm]time=[\d.]+\n")
_DIGITS_AS_ZERO = np.array([ord("0") if chr(byte) in "0123456789" else byte for byte in range(256)], np.uint8)

Blocks = npt.NDArray[np.uint8]
"""[N, 512]"""
Rows = npt.NDArray[np.int64]
"""Indices of blocks [N]."""


class Kinds(NamedTuple):
    """Headers of one kind differ in name, size, time and checksum only.

    Attributes:
        codes: int32 [N], index of the kind of each header.
        prefixes: by kind, what precedes the name.
    """

    codes: npt.NDArray[np.int32]
    prefixes: list[str]


class HeaderChecks:
    """Checks headers; remembers the kinds that `tarfile` accepted the last time."""

    def __init__(self) -> None:
        self._known: dict[bytes, str] = {}

    def check(self, headers: Blocks) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64], Kinds]:
        """Check headers.

        Returns: which are plain, bool [N], as others may still be valid; their sizes, int64 [N]; their kinds.
        """
        sums = headers[:, _SUMMED].sum(axis=1, dtype=np.uint32)
        sizes, claimed, end = headers[:, SIZE], headers[:, CHECKSUM][:, :6], headers[:, CHECKSUM][:, 6:]
        good = (end[:, 0] == 0) & (end[:, 1] == ord(" ")) & _are_octal(claimed)
        for field in (sizes, headers[:, TIME]):
            good &= _are_octal(field[:, :-1]) & ((field[:, -1] == 0) | (field[:, -1] == ord(" ")))
        coded = coded_rows(np.concatenate([headers[:, _OWNER], headers[:, _REST]], axis=1))
        codes: npt.NDArray[np.int32] = coded.indices.to_numpy()
        kinds = coded.dictionary.to_pylist()
        rest = np.array([sum(kind[_OWNER_BYTES:]) for kind in kinds], np.int64)
        good &= sums + rest[codes] + _SPACES == _octal(claimed)
        known, self._known = self._known, {}
        prefixes = []
        for code, kind in enumerate(kinds):
            prefix = known.get(kind)
            if prefix is None:
                prefix = _prefix(headers[good & (codes == code)])
            if prefix is None:
                good &= codes != code
            else:
                self._known[kind] = prefix
            prefixes.append(prefix or "")
        return good, _octal(sizes[:, :-1]), Kinds(codes, prefixes)


def are_times(blocks: Blocks) -> npt.NDArray[np.bool_]:
    """Which blocks of pax records hold times and nothing else, bool [N]."""
    # The first two digits are the length of the record. Others make no difference, and few forms remain.
    records = blocks[:, :_RECORD].copy()
    records[:, 2:] = _DIGITS_AS_ZERO[records[:, 2:]]
    coded = coded_rows(records)
    good: npt.NDArray[np.bool_]
    good = np.array([_is_time(form) for form in coded.dictionary.to_pylist()], np.bool_)[coded.indices.to_numpy()]
    good &= records[:, -1] == 0  # what follows a zero is no record
    for place in np.flatnonzero(~good).tolist():
        good[place] = _is_time(blocks[place].tobytes())
    return good


def names_of(headers: Blocks, kinds: Kinds) -> pa.LargeStringArray:
    """The names in headers, of which `kinds` are those of these and maybe more."""
    fields = np.ascontiguousarray(headers[:, NAME])
    texts = fields.view(f"S{fields.shape[1]}").ravel()
    if (fields < 128).all():
        names = pa.array(texts).cast(pa.large_string())  # up to the first zero byte
    else:
        names = pa.array([as_name(text) for text in texts.tolist()], pa.large_string())
    if any(kinds.prefixes):
        prefixes = pa.array(kinds.prefixes, pa.large_string()).take(pa.array(kinds.codes[: len(headers)]))
        names = joined(prefixes, names)
    return names


def as_name(field: bytes) -> str:
    """The text of a name's field, which ends at a zero byte."""
    return field.partition(b"\0")[0].decode(ENCODING, NAMES)


def coded_rows(rows: Blocks) -> pa.DictionaryArray:
    """The distinct rows of a matrix and the code of each row, in the order of their first occurrence."""
    count, width = rows.shape
    texts = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), count, [None, pa.py_buffer(rows)])
    return texts.dictionary_encode()


def _prefix(headers: Blocks) -> str | None:
    """The prefix of the name in headers of one kind; None if there are none, or `tarfile` refuses the first."""
    if not len(headers):
        return None
    block = headers[0].tobytes()
    try:
        tarfile.TarInfo.frombuf(block, ENCODING, NAMES)
    except tarfile.HeaderError:
        return None
    prefix = as_name(block[_PREFIX])
    return f"{prefix}/" if prefix else ""


def _are_octal(fields: Blocks) -> npt.NDArray[np.bool_]:
    """Which fields [N, width] hold octal digits, after any number of spaces."""
    digits = fields - np.uint8(ord("0")) < 8
    if digits.all():
        return digits[:, 0]
    spaces = fields == ord(" ")
    ordered = ~(digits[:, :-1] & spaces[:, 1:]).any(axis=1)
    found: npt.NDArray[np.bool_] = digits[:, -1] & (digits | spaces).all(axis=1) & ordered
    return found


def _octal(fields: Blocks) -> npt.NDArray[np.int64]:
    """The numbers in octal fields [N, width]."""
    powers = 8 ** np.arange(fields.shape[1], dtype=np.int64)[::-1]
    return (fields & 7).astype(np.int64) @ powers  # a space counts as 0


def _is_time(block: bytes) -> bool:
    """Whether a pax header holds times and nothing else."""
    place = 0
    while found := _TIME.match(block, place):
        if int(found[1]) != found.end() - place:
            return False
        place = found.end()
    return place > 0 and not block[place:].strip(b"\0")
