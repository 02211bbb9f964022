"""Splits paths in tars into the sample's part, up to the first dot of the file name, and the extension. F files."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datamerge.sources.naming import Indices, buffers_of

_JUNK = "__MACOSX"  # folder of what the file manager of macOS adds


class SplitPaths(NamedTuple):
    """The paths that belong to samples.

    Attributes:
        rows: int64 [R], ascending indices of these paths among all F.
        stems: Arrow large strings [R].
        extensions: distinct extensions in lower case, in the order of their first occurrence.
        codes: int64 [R], index of each path's extension.
    """

    rows: npt.NDArray[np.int64]
    stems: pa.LargeStringArray
    extensions: list[str]
    codes: npt.NDArray[np.int64]


def split(names: pa.LargeStringArray) -> SplitPaths:
    """Split paths; those without an extension, of hidden files and of junk are left out."""
    ends, text = buffers_of(names)
    begins, ends = ends[:-1], ends[1:]
    bases = begins.copy()  # of the file names
    slashes = np.flatnonzero(text == ord("/"))
    bases[np.searchsorted(ends, slashes, "right")] = slashes + 1  # the last assignment wins
    dots = ends.copy()
    found = np.flatnonzero(text == ord("."))
    owners = np.searchsorted(ends, found, "right")
    inside = found >= bases[owners]
    dots[owners[inside][::-1]] = found[inside][::-1]  # the first one wins
    belongs = (bases < dots) & (dots < ends)
    is_junk = pc.starts_with(names, _JUNK).to_numpy(zero_copy_only=False)
    belongs &= ~(is_junk & (bases > begins + 1))
    rows = np.flatnonzero(belongs)
    begins, bases, dots, ends = begins[rows], bases[rows], dots[rows], ends[rows]
    begins += bases == begins + 1  # `/a.jpg` is `a.jpg`
    coded = _parts(text, dots + 1, ends).dictionary_encode()
    places: dict[str, int] = {}
    table = [places.setdefault(text.lower(), len(places)) for text in coded.dictionary.to_pylist()]
    codes = np.array(table, np.int64)[coded.indices.to_numpy()]
    return SplitPaths(rows, _parts(text, begins, dots), list(places), codes)


def _parts(text: npt.NDArray[np.uint8], starts: Indices, stops: Indices) -> pa.LargeStringArray:
    """The texts in [start, stop), which do not overlap, as an Arrow array."""
    steps = np.zeros(len(text) + 1, np.int8)
    steps[starts] += 1
    steps[stops] -= 1
    chosen = text[np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)]
    ends = np.concatenate([[0], np.cumsum(stops - starts)])
    return pa.LargeStringArray.from_buffers(len(starts), pa.py_buffer(ends), pa.py_buffer(chosen))
