"""Paths and sizes of very many files as columns, in 16 bytes per file and its path. F files."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datamerge.sources.naming import CHUNK

File = tuple[str, int]
"""Path relative to the source, and size in bytes."""


@dataclass(frozen=True, eq=False)
class Files(Sequence[File]):
    """Files, sorted by path.

    Attributes:
        names: paths, Arrow large strings [F].
        sizes: int64 [F], bytes.
        folders: folders that contain files directly, in any order; an empty text is the top.
        of_folder: int32 [F], index of each file's folder.
    """

    names: pa.LargeStringArray
    sizes: npt.NDArray[np.int64]
    folders: Sequence[str]
    of_folder: npt.NDArray[np.int32]

    @classmethod
    def of(cls, files: Iterable[File]) -> Files:
        """From paths and sizes in any order."""
        if isinstance(files, Files):
            return files
        collected = Collected()
        for name, size in files:
            collected.add(name, size)
        return collected.files()

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> File: ...

    @overload
    def __getitem__(self, index: slice) -> list[File]: ...

    def __getitem__(self, index: int | slice) -> File | list[File]:
        if isinstance(index, slice):
            return list(zip(self.names[index].to_pylist(), self.sizes[index].tolist(), strict=True))
        return self.names[index].as_py(), int(self.sizes[index])

    def __iter__(self) -> Iterator[File]:
        for start in range(0, len(self), CHUNK):
            yield from self[start : start + CHUNK]

    def paths(self) -> Iterator[str]:
        """Yield the paths; few of them exist as Python strings at a time."""
        for start in range(0, len(self), CHUNK):
            yield from self.names[start : start + CHUNK].to_pylist()

    def where(self, chosen: npt.NDArray[np.bool_]) -> Files:
        """The files that a mask [F] selects."""
        of_folder = self.of_folder[chosen]
        used = np.flatnonzero(np.bincount(of_folder, minlength=len(self.folders)))
        places = np.zeros(len(self.folders), np.int32)
        places[used] = np.arange(len(used))
        names = self.names.filter(pa.array(chosen))
        return Files(names, self.sizes[chosen], [self.folders[place] for place in used.tolist()], places[of_folder])

    def in_folders(self, chosen: Sequence[bool]) -> Files:
        """The files in the folders for which `chosen`, one value per folder, is True."""
        return self if all(chosen) else self.where(np.array(chosen, np.bool_)[self.of_folder])

    def below(self, folder: str) -> Files:
        """The same files with paths relative to a folder that contains them all."""
        cut = len(folder) + 1
        names = pc.utf8_slice_codeunits(self.names, cut)
        return Files(names, self.sizes, [path[cut:] for path in self.folders], self.of_folder)


class Collected:
    """Collects files one by one, in growing buffers."""

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q", [0])
        self._sizes = array("q")
        self._last = b""
        self._is_sorted = True

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, name: str, size: int) -> None:
        """Add a file.

        Raises:
            UnicodeEncodeError: the name is not valid text.
        """
        text = name.encode()
        if text < self._last:
            self._is_sorted = False
        self._last = text
        self._text += text
        self._ends.append(len(self._text))
        self._sizes.append(size)

    def files(self) -> Files:
        """All files. The result takes over the buffers, so no file can be added afterwards."""
        names = pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._text))
        sizes = np.frombuffer(self._sizes, np.int64)
        if not self._is_sorted:
            order = pc.sort_indices(names)  # the order of UTF-8 is that of Python strings
            names, sizes = names.take(order), sizes[order.to_numpy()]
        places: dict[str, int] = {}
        of_folder = np.empty(len(sizes), np.int32)
        for start in range(0, len(sizes), CHUNK):
            folders = [name.rpartition("/")[0] for name in names[start : start + CHUNK].to_pylist()]
            of_folder[start : start + CHUNK] = [places.setdefault(folder, len(places)) for folder in folders]
        return Files(names, sizes, list(places), of_folder)
