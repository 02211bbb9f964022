"""Names and keys of samples, stored compactly and computed on access.

    Paths     paths of files are stored, keys are computed from them
    Rows      names are FILE#ROW, keys STEM-ROW; only files are stored
    Members   names are TAR#START+SIZE STEM; paths in tars are stored, keys are computed from them
    Listed    both are stored

M samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datamerge.sources.sample import END, clash_suffix, keys_in, plain_keys

Indices = npt.NDArray[np.integer[Any]]
CHUNK = 16384
"""Number of samples that exist as Python objects at a time during an iteration."""


class Naming(Protocol):
    """The names and keys of M samples."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that grow with M."""
        ...

    def __len__(self) -> int: ...

    def names(self, start: int, stop: int) -> list[str]:
        """Names of the samples in [start, stop), `stop` ≤ M."""
        ...

    def keys(self, start: int, stop: int) -> list[str]:
        """Keys of the samples in [start, stop), `stop` ≤ M."""
        ...

    def slice(self, start: int, stop: int) -> Naming:
        """Names and keys of the samples in [start, stop)."""
        ...

    def take(self, indices: Indices) -> Naming:
        """Names and keys of the samples at these indices, in this order."""
        ...


@dataclass(frozen=True, eq=False)
class _Named:
    """Stored names.

    Attributes:
        texts: names, Arrow large strings [M].
    """

    texts: pa.LargeStringArray

    def __len__(self) -> int:
        return len(self.texts)

    def names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.texts[start:stop].to_pylist()
        return names


@dataclass(frozen=True, eq=False)
class Paths(_Named):
    """Stored names, from which keys are computed as in `make_keys`.

    Attributes:
        clashing: bool [M], whether another name gives the same key; None if none does.
    """

    clashing: npt.NDArray[np.bool_] | None

    @classmethod
    def of(cls, texts: pa.LargeStringArray) -> Paths:
        """Find out which keys clash."""
        names = _Named(texts).names
        return cls(texts, clashing(len(texts), lambda start, stop: plain_keys(names(start, stop))))

    @property
    def nbytes(self) -> int:
        return int(self.texts.nbytes) + (0 if self.clashing is None else self.clashing.nbytes)

    def keys(self, start: int, stop: int) -> list[str]:
        names = self.names(start, stop)
        return _distinct(plain_keys(names), self.clashing, start, names.__getitem__)

    def slice(self, start: int, stop: int) -> Paths:
        return Paths(self.texts[start:stop], None if self.clashing is None else self.clashing[start:stop])

    def take(self, indices: Indices) -> Paths:
        clashing = None if self.clashing is None else self.clashing[indices]
        return Paths(self.texts.take(pa.array(indices)), clashing)

    def __reduce__(self) -> tuple[Any, ...]:
        return Paths, (_compact(self.texts), self.clashing)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of files: names and keys consist of a prefix per file and the number of the row.

    Attributes:
        files: prefix of names, by file.
        stems: prefix of keys, by file.
        starts: int64 [files + 1], number of rows in the preceding files; then the total.
        places: int64 [M], indices of the rows in the concatenation of all files; None for all rows.
    """

    files: Sequence[str]
    stems: Sequence[str]
    starts: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64] | None = None

    @classmethod
    def of(cls, files: Sequence[str], stems: Sequence[str], rows: Sequence[int]) -> Rows:
        """All rows of files; `rows` gives their numbers."""
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
class Members:
    """Files in tars.

    Attributes:
        tars: paths of the tars.
        beginnings: prefix of keys, by tar.
        of_tar: int32 [M], index of the tar of each file.
        stems: paths inside the tar up to the first dot of the file name, Arrow large strings [M].
        starts, sizes: integers [M], byte offset and size of the content.
        clashing: as in `Paths`.
    """

    tars: Sequence[str]
    beginnings: Sequence[str]
    of_tar: npt.NDArray[np.int32]
    stems: pa.LargeStringArray
    starts: Indices
    sizes: Indices
    clashing: npt.NDArray[np.bool_] | None

    @classmethod
    def of(
        cls,
        tars: Sequence[str],
        of_tar: npt.NDArray[np.int32],
        stems: pa.LargeStringArray,
        starts: Indices,
        sizes: Indices,
    ) -> Members:
        """Find out which keys clash."""
        found = cls(tars, [_without_marks(f"{tar}#") for tar in tars], of_tar, stems, starts, sizes, None)
        return replace(found, clashing=clashing(len(found), found._plain_keys))

    @property
    def nbytes(self) -> int:
        columns = (self.of_tar, self.starts, self.sizes, self.clashing)
        return int(self.stems.nbytes) + sum(column.nbytes for column in columns if column is not None)

    def __len__(self) -> int:
        return len(self.starts)

    def names(self, start: int, stop: int) -> list[str]:
        names: list[str] = self.texts(start, stop).to_pylist()
        return names

    def texts(self, start: int, stop: int) -> pa.LargeStringArray:
        """The names as Arrow large strings."""
        stems = self.stems[start:stop]
        if _has_marks(stems):
            stems = pc.replace_substring_regex(stems, "(?s)^.*#", "")  # a reader splits at the last mark
        first, size = (pa.array(column[start:stop]).cast(pa.large_string()) for column in (self.starts, self.sizes))
        return joined(self._of_tars(self.tars, start, stop), "#", first, "+", size, " ", stems)

    def keys(self, start: int, stop: int) -> list[str]:
        return _distinct(
            self._plain_keys(start, stop), self.clashing, start, lambda place: self._key_text(start + place)
        )

    def slice(self, start: int, stop: int) -> Members:
        return self._each(lambda column: column[start:stop], self.stems[start:stop])

    def take(self, indices: Indices) -> Members:
        return self._each(lambda column: column[indices], self.stems.take(pa.array(indices)))

    def __reduce__(self) -> tuple[Any, ...]:
        columns = (self.of_tar, _compact(self.stems), self.starts, self.sizes, self.clashing)
        return Members, (self.tars, self.beginnings, *columns)

    def _each(self, of: Callable[[npt.NDArray[Any]], npt.NDArray[Any]], stems: pa.LargeStringArray) -> Members:
        columns = (of(self.of_tar), stems, of(self.starts), of(self.sizes))
        return Members(
            self.tars, self.beginnings, *columns, clashing=None if self.clashing is None else of(self.clashing)
        )

    def _plain_keys(self, start: int, stop: int) -> list[str]:
        """Keys without suffixes for those that clash."""
        if start == stop:
            return []
        begins, stems = self._of_tars(self.beginnings, start, stop), self.stems[start:stop]
        if _has_marks(stems):
            stems = pa.array(map(_without_marks, stems.to_pylist()), pa.large_string())
        texts = joined(begins, stems).cast(pa.large_binary())
        return keys_in(buffers_of(joined(texts, END))[1].tobytes()[: -len(END)])

    def _key_text(self, place: int) -> str:
        """The text of which a key is that of a file; the suffix keeps a dot in a name from being an extension."""
        stem: str = self.stems[place].as_py()
        return f"{self.beginnings[self.of_tar[place]]}{_without_marks(stem)}.image"

    def _of_tars(self, texts: Sequence[str], start: int, stop: int) -> pa.LargeStringArray:
        """A text by tar for each file."""
        coded = pa.array(self.of_tar[start:stop]).dictionary_encode()
        return pa.array([texts[tar] for tar in coded.dictionary.to_pylist()], pa.large_string()).take(coded.indices)


@dataclass(frozen=True, eq=False)
class Listed(_Named):
    """Stored names and keys.

    Attributes:
        of_keys: keys, Arrow large strings [M].
    """

    of_keys: pa.LargeStringArray

    @classmethod
    def of(cls, names: Iterable[str], keys: Iterable[str]) -> Listed:
        """From Python strings, which have to be valid in UTF-8."""
        return cls(pa.array(names, pa.large_string()), pa.array(keys, pa.large_string()))

    @property
    def nbytes(self) -> int:
        return int(self.texts.nbytes + self.of_keys.nbytes)

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


def clashing(count: int, plain: Callable[[int, int], list[str]]) -> npt.NDArray[np.bool_] | None:
    """Which of M keys are equal to another one, bool [M]; None if none is.

    Hashes of the keys, at 8 bytes each, are compared first. `plain` gives the keys in [start, stop).
    """

    def parts() -> Iterator[tuple[int, list[str]]]:
        return ((start, plain(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK))

    hashes = np.empty(count, np.int64)
    for start, keys in parts():
        hashes[start : start + len(keys)] = _hashes(keys)
    hashes.sort()
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    del hashes
    if not len(repeated):
        return None
    # Keys are computed a second time instead of stored. Compare them, as different keys may have one hash.
    found = [(start + place, keys[place]) for start, keys in parts() for place in _among(keys, repeated)]
    times = Counter(key for _, key in found)
    clash = np.zeros(count, np.bool_)
    clash[[place for place, key in found if times[key] > 1]] = True
    return clash if clash.any() else None


def _among(keys: Sequence[str], repeated: npt.NDArray[np.int64]) -> list[int]:
    found: list[int] = np.flatnonzero(np.isin(_hashes(keys), repeated)).tolist()
    return found


def _hashes(keys: Sequence[str]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(hash, keys), np.int64, len(keys))


def _distinct(
    keys: list[str], clashing: npt.NDArray[np.bool_] | None, start: int, text_of: Callable[[int], str]
) -> list[str]:
    """Consecutive keys that begin at index `start`, with suffixes from their texts where they clash."""
    if clashing is not None:
        for place in np.flatnonzero(clashing[start : start + len(keys)]).tolist():
            keys[place] += clash_suffix(text_of(place))
    return keys


def _without_marks(text: str) -> str:
    return text.replace(".tar#", "-").replace("#", "-")


def _has_marks(texts: pa.LargeStringArray) -> bool:
    return bool(pc.any(pc.match_substring(texts, "#")).as_py())


def joined(*columns: pa.Array | str | bytes) -> pa.Array:
    """The texts of columns and constants, one after the other; columns are of one type, the large ones of Arrow."""
    (kind,) = {column.type for column in columns if isinstance(column, pa.Array)}
    texts = (column if isinstance(column, pa.Array) else pa.scalar(column, kind) for column in columns)
    return pc.binary_join_element_wise(*texts, pa.scalar("", kind))


def buffers_of(texts: pa.LargeStringArray | pa.LargeBinaryArray) -> tuple[Indices, npt.NDArray[np.uint8]]:
    """Offsets [M + 1] and bytes of an array that is no slice."""
    _, ends, text = texts.buffers()
    offsets = np.frombuffer(ends, np.int64)[: len(texts) + 1]
    return offsets, np.frombuffer(text or b"", np.uint8)[: offsets[-1]]


def _compact(texts: pa.LargeStringArray) -> pa.LargeStringArray:
    """A copy of a slice without the rest of its buffer, which would be pickled too."""
    return pa.concat_arrays([texts])
