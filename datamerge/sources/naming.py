"""Names and keys of samples, in as few bytes as they can be computed from.

    Paths     names of files are kept, keys are computed from them
    Rows      FILE#ROW and STEM-ROW: the files are kept
    Listed    both are kept

M samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.sample import clash_suffix, plain_keys

Indices = npt.NDArray[np.integer[Any]]
CHUNK = 16384
"""Samples that exist as Python objects at a time where all are gone through."""


class Naming(Protocol):
    """The names and keys of M samples."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory, of what grows with M."""
        ...

    def __len__(self) -> int: ...

    def names(self, start: int, stop: int) -> list[str]:
        """Names of consecutive samples; `stop` ≤ M."""
        ...

    def keys(self, start: int, stop: int) -> list[str]:
        """Keys of consecutive samples; `stop` ≤ M."""
        ...

    def slice(self, start: int, stop: int) -> Naming:
        """Those of consecutive samples."""
        ...

    def take(self, indices: Indices) -> Naming:
        """Those at these places, in this order."""
        ...


@dataclass(frozen=True, eq=False)
class Paths:
    """Keys are computed from the names as `make_keys` does.

    Attributes:
        texts: Arrow's large strings [M].
        clashing: bool [M], whether another name gives the same key; None if none does.
    """

    texts: pa.LargeStringArray
    clashing: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, texts: pa.LargeStringArray) -> Paths:
        """Find out which clash, by hashes of the keys first, which take 8 bytes each."""
        hashes = np.empty(len(texts), np.int64)
        for start in range(0, len(texts), CHUNK):
            hashes[start : start + CHUNK] = _key_hashes(texts[start : start + CHUNK])
        hashes.sort()
        repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
        del hashes
        if not len(repeated):
            return cls(texts, None)
        # Computed again, for the memory of another column.
        found = [
            start + np.flatnonzero(np.isin(_key_hashes(texts[start : start + CHUNK]), repeated))
            for start in range(0, len(texts), CHUNK)
        ]
        places = np.concatenate(found)
        # Two keys may have one hash by accident.
        keys = [key for part in _parts(texts.take(pa.array(places))) for key in plain_keys(part)]
        times = Counter(keys)
        clashing = np.zeros(len(texts), np.bool_)
        clashing[places] = [times[key] > 1 for key in keys]
        return cls(texts, clashing if clashing.any() else None)

    @property
    def nbytes(self) -> int:
        return int(self.texts.nbytes) + (0 if self.clashing is None else self.clashing.nbytes)

    def __len__(self) -> int:
        return len(self.texts)

    def names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.texts[start:stop].to_pylist()
        return names

    def keys(self, start: int, stop: int) -> list[str]:
        names = self.names(start, stop)
        keys = plain_keys(names)
        if self.clashing is not None:
            for place in np.flatnonzero(self.clashing[start:stop]).tolist():
                keys[place] += clash_suffix(names[place])
        return keys

    def slice(self, start: int, stop: int) -> Paths:
        return Paths(self.texts[start:stop], None if self.clashing is None else self.clashing[start:stop])

    def take(self, indices: Indices) -> Paths:
        clashing = None if self.clashing is None else self.clashing[indices]
        return Paths(self.texts.take(pa.array(indices)), clashing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Paths, (_compact(self.texts), self.clashing)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of files: names and keys are a file's and a number.

    Attributes:
        files: what names begin with, by file.
        stems: what keys begin with, by file.
        starts: int64 [files + 1], rows of the files before each, and of all.
        places: int64 [M], rows of the files taken one after the other; None for all of them.
    """

    files: Sequence[str]
    stems: Sequence[str]
    starts: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, files: Sequence[str], stems: Sequence[str], rows: Sequence[int]) -> Rows:
        """All rows of files that have so many."""
        return cls(files, stems, np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]))

    @property
    def nbytes(self) -> int:
        return self.starts.nbytes + (0 if self.places is None else self.places.nbytes)

    def __len__(self) -> int:
        return int(self.starts[-1]) if self.places is None else len(self.places)

    def names(self, start: int, stop: int) -> list[str]:
        return [f"{self.files[file]}#{row}" for file, row in self._rows(start, stop)]

    def keys(self, start: int, stop: int) -> list[str]:
        return [f"{self.stems[file]}-{row:08d}" for file, row in self._rows(start, stop)]

    def slice(self, start: int, stop: int) -> Rows:
        return replace(self, places=self._places(start, stop))

    def take(self, indices: Indices) -> Rows:
        places = np.asarray(indices, np.int64)
        return replace(self, places=places if self.places is None else self.places[places])

    def _places(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        return np.arange(start, stop) if self.places is None else self.places[start:stop]

    def _rows(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        places = self._places(start, stop)
        files = np.searchsorted(self.starts, places, side="right") - 1
        return zip(files.tolist(), (places - self.starts[files]).tolist(), strict=True)


@dataclass(frozen=True, eq=False)
class Listed:
    """Names and keys that are not computed.

    Attributes:
        texts: names, Arrow's large strings [M].
        of_keys: keys, likewise.
    """

    texts: pa.LargeStringArray
    of_keys: pa.LargeStringArray

    @classmethod
    def of(cls, names: Iterable[str], keys: Iterable[str]) -> Listed:
        """Of Python's texts, which UTF-8 has to be able to say."""
        return cls(pa.array(names, pa.large_string()), pa.array(keys, pa.large_string()))

    @property
    def nbytes(self) -> int:
        return int(self.texts.nbytes + self.of_keys.nbytes)

    def __len__(self) -> int:
        return len(self.texts)

    def names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.texts[start:stop].to_pylist()
        return names

    def keys(self, start: int, stop: int) -> list[str]:
        keys: list[str] = self.of_keys[start:stop].to_pylist()
        return keys

    def slice(self, start: int, stop: int) -> Listed:
        return Listed(self.texts[start:stop], self.of_keys[start:stop])

    def take(self, indices: Indices) -> Listed:
        places = pa.array(indices)
        return Listed(self.texts.take(places), self.of_keys.take(places))

    def __reduce__(self) -> tuple[Any, ...]:
        return Listed, (_compact(self.texts), _compact(self.of_keys))


def _key_hashes(texts: pa.LargeStringArray) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, plain_keys(texts.to_pylist())), np.int64, len(texts))


def _parts(texts: pa.LargeStringArray) -> Iterator[list[str]]:
    for start in range(0, len(texts), CHUNK):
        yield texts[start : start + CHUNK].to_pylist()


def _compact(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """A copy without what is around a slice, which would be pickled with it."""
    return pa.concat_arrays([texts])
