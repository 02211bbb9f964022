"""The listing of a source's files as columns: names, sizes, and hashes of the files whose content was read."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import ItemsView, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.files import Files
from datamerge.sources.naming import CHUNK
from datamerge.sources.sample import hash_contents
from storage_schemas import Location

DIGEST_BYTES = 32


@dataclass(frozen=True, eq=False)
class FileList(Mapping[str, Sequence[Any]]):
    """A mapping from file to [bytes, SHA-256 or None].

    Attributes:
        names: paths, Arrow large strings [F], sorted.
        sizes: int64 [F], bytes.
        hashed: int64 [H], ascending indices of the files with a hash.
        digests: uint8 [H, 32], their SHA-256.
    """

    names: pa.LargeStringArray
    sizes: npt.NDArray[np.int64]
    hashed: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, location: Location, files: Files) -> FileList:
        """From sorted files; reads and hashes some of them."""
        hashes = hash_contents(location, files.paths(), files.sizes)
        digests = b"".join(bytes.fromhex(hashes[place]) for place in sorted(hashes))
        return cls(
            files.names,
            files.sizes,
            np.array(sorted(hashes), np.int64),
            np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of memory, without the names."""
        return self.sizes.nbytes + self.hashed.nbytes + self.digests.nbytes

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        for part in self._parts():
            yield from part

    def __getitem__(self, name: str) -> list[Any]:
        place = bisect_left(range(len(self)), name, key=lambda place: self.names[place].as_py())
        found = self._part(place, place + 1)
        return found[name]

    def items(self) -> ItemsView[str, Sequence[Any]]:
        return _Items(self)

    def json(self) -> Iterator[str]:
        """The text that `json.dumps` gives for the mapping as a dict, in pieces."""
        yield "{"
        for start in range(0, len(self), CHUNK):
            # One list per file would burden the garbage collector.
            names = map(encode_basestring_ascii, self.names[start : start + CHUNK].to_pylist())
            hashes = [f'"{digest}"' if digest else "null" for digest in self._hashes(start, start + CHUNK)]
            facts = zip(names, self.sizes[start : start + CHUNK].tolist(), hashes, strict=True)
            yield ", " * (start > 0) + ", ".join([f"{name}: [{size}, {digest}]" for name, size, digest in facts])
        yield "}"

    def _parts(self) -> Iterator[dict[str, list[Any]]]:
        return (self._part(start, start + CHUNK) for start in range(0, len(self), CHUNK))

    def _part(self, start: int, stop: int) -> dict[str, list[Any]]:
        names, sizes = self.names[start:stop].to_pylist(), self.sizes[start:stop].tolist()
        hashes = self._hashes(start, stop)
        return {name: [size, digest] for name, size, digest in zip(names, sizes, hashes, strict=True)}

    def _hashes(self, start: int, stop: int) -> list[str | None]:
        hashes: list[str | None] = [None] * (min(stop, len(self)) - start)
        first, last = np.searchsorted(self.hashed, (start, stop)).tolist()
        for place, digest in zip(self.hashed[first:last].tolist(), self.digests[first:last], strict=True):
            hashes[place - start] = digest.tobytes().hex()
        return hashes


class _Items(ItemsView[str, Sequence[Any]]):
    """Items in order, without a search for each name."""

    _mapping: FileList

    def __iter__(self) -> Iterator[tuple[str, Sequence[Any]]]:
        for part in self._mapping._parts():
            yield from part.items()
