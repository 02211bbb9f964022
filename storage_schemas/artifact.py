"""Read an artifact by index, by key or in storage order, from a folder or any fsspec URL."""

from __future__ import annotations

import bisect
import copy
import operator
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain
from typing import Any, Literal, SupportsIndex

import numpy as np

from storage_schemas.access.cache import Cache, CachedLocation
from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.access.location import Location
from storage_schemas.access.ranges import check_files
from storage_schemas.display import one_line, table
from storage_schemas.errors import CorruptShard, DatamergeError, NotAnArtifact, shortened
from storage_schemas.in_order import in_order
from storage_schemas.key_index import find
from storage_schemas.schema.arguments import check_choice
from storage_schemas.schema.head import parse_head
from storage_schemas.schema.manifest import (
    HEAD,
    KEYS,
    MANIFEST,
    PREVIEW,
    Commit,
    FileEntry,
    Manifest,
    parse,
)
from storage_schemas.schema.packed import Sidecar, sizes_of
from storage_schemas.schema.record import Array, Record
from storage_schemas.sidecars import Sidecars, read_committed
from storage_schemas.stores import store_of
from storage_schemas.stores.arrays import Rows, read_arrays

LARGEST_SHEET = 8 * 2**20  # bytes of the largest contact sheet that a notebook shows

Verify = Literal["off", "record", "shard"]


def open_artifact(
    url: str | os.PathLike[str] | Location,
    *,
    partial: bool = False,
    verify: Verify = "record",
    cache: Cache | None = None,
) -> Artifact:
    """Open an artifact for reading.

    Args:
        url: a folder or fsspec URL, or a `Location` if the driver needs options.
        partial: accept an artifact whose merge has not finished; only its committed shards are read.
        verify: what is compared with the committed checksums when a record is read: its arrays (`record`), all files
            of its shard, once, at the first read of one of its records (`shard`), or nothing (`off`). Sidecars are
            always checked.
        cache: stores copies of the files of a remote artifact; without it byte ranges of single records are fetched.

    Raises:
        ConfigError: another value of `verify`.
        NotAnArtifact: there is no manifest, or the merge is unfinished and `partial` is False.
        SchemaError: the manifest does not follow the format.
        CorruptShard: the manifest does not match its own sha256.
    """
    check_choice("verify", verify, Verify)
    location = url if isinstance(url, Location) else Location(url)
    if cache is not None:
        location = CachedLocation.of(location, cache)
    return Artifact(location, partial=partial, verify=verify)


class Artifact:
    """A sequence of `Record`s, indexed by position among the committed groups in storage order, or by key.

    The arrays of a record are read-only: those of a local tar file are views of it. Instances can be pickled and sent
    to workers; open files are not shared. `shard_sizes` holds the number of groups of each committed shard.
    """

    def __init__(self, location: Location, *, partial: bool, verify: Verify) -> None:
        self.location = location
        self._verify = verify
        self._checked_shards: set[int] = set()
        try:
            data = location.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAnArtifact(f"{location.url}: expected an artifact, found no {MANIFEST} there") from None
        self.manifest = parse(Manifest, data, f"{location.url}/{MANIFEST}")
        if not self.manifest.complete and not partial:
            raise NotAnArtifact(
                f"{location.url}: the merge is not finished ({len(self.manifest.shards)} of "
                f"{self.manifest.layout.shards} shards in the manifest); run the command that made it again"
            )
        self.shard_sizes: list[int] = list(self.manifest.shards.column("groups"))
        self._index_is_sound = False
        self._specs, self._facts, self._keeps_all = self.manifest.layout.arrays, True, False
        self._starts = [0, *np.cumsum(self.shard_sizes, dtype=np.int64).tolist()]
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | str) -> Record:
        """The record with this index or key; negative indices count from the end.

        Raises:
            IndexError, KeyError: no such record.
            TypeError: neither an index nor a key, such as a slice.
            CorruptShard: its bytes differ from the committed ones.
        """
        if isinstance(index, str):
            return self.read(*self._find(index))
        return self.part(self._checked(index))

    def _checked(self, index: object) -> int:
        """The index counted from the start; raises TypeError or IndexError for an invalid one."""
        if not isinstance(index, SupportsIndex):
            raise TypeError(f"{self.location.url}: expected an index or a key, found {shortened(index)}")
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.location.url}: record {number} of {len(self)}")
        return number % len(self)

    def part(self, index: int, rows: Rows | None = None) -> Record:
        """Record `index`, which is at least 0; `rows` selects rows of some arrays, see `read_arrays`."""
        return self.read(*self._place(index), rows=rows)

    def __iter__(self) -> Iterator[Record]:
        return in_order(self, range(len(self)))

    def records(self, indices: Iterable[int]) -> Iterator[Record]:
        """The records with these indices, in this order; records of a remote artifact are prefetched.

        Raises:
            IndexError, TypeError, CorruptShard: as `artifact[index]`.
        """
        return in_order(self, map(self._checked, indices))

    def read(self, position: int, offset: int, *, rows: Rows | None = None) -> Record:
        """Record `offset` of the shard at `position` in the manifest's list; see `part`."""
        try:
            return self._read(position, offset, rows)
        except CorruptShard:
            if not self._forget_copies(position):
                raise
        return self._read(position, offset, rows)

    def _read(self, position: int, offset: int, rows: Rows | None) -> Record:
        commit = self._sidecar(position)
        if self._verify == "shard" and position not in self._checked_shards:
            check_files(self.location, commit.files)
            self._checked_shards.add(position)
        entry = commit.records[offset]
        try:
            arrays = read_arrays(self._reader, commit, offset, self._specs, self._verify == "record", rows)
        except CorruptShard as error:
            raise CorruptShard(f"{self.location.url}: {error}; see `datamerge verify`") from None
        return Record(
            key=entry.key,
            count=entry.count,
            encoding=self.manifest.layout.encoding,
            arrays=arrays,
            label=entry.label,
            samples=entry.samples,
            info=entry.info,
        )

    def _forget_copies(self, position: int) -> bool:
        """Drop the shard's cached copies, once, in case only the cache is damaged; True if there were any."""
        if position in self._fetched_again:
            return False
        self._fetched_again.add(position)
        dropped = self.location.forget(file.path for file in self._sidecar(position).files)
        if dropped:
            self._reader = store_of(self.manifest.layout).reader(self.location)
        return dropped

    def only(self, names: Collection[str], *, facts: bool = True) -> Artifact:
        """A view of the artifact that reads these arrays alone; its records lack the others.

        Args:
            names: of the arrays.
            facts: whether records have `samples` and `info`. Without them the sidecars of thousands of shards fit in
                memory, which speeds up reading in random order.
        """
        selected = copy.copy(self)
        selected._specs = tuple(spec for spec in self.manifest.layout.arrays if spec.name in names)
        selected._facts = facts
        return selected

    def keeping_sidecars(self) -> Artifact:
        """A view of the artifact that reads each sidecar once, for reading all records in another order.

        It keeps about 260 bytes per record with one sample.
        """
        keeping = copy.copy(self)
        keeping._keeps_all = True
        keeping._reset()
        return keeping

    def apart(self) -> Artifact:
        """A view with its own prefetching, which other readers of the artifact neither cancel nor delay."""
        apart = copy.copy(self)
        apart.location = copy.copy(self.location)
        apart._reset()
        return apart

    def expect(self, indices: Sequence[int], *, together: bool = False) -> int:
        """Announce that these records will be read in this order, and prefetch them with many requests at a time.

        Waits for sidecars and shard indices, which locate the records, but not for the records. Does nothing for a
        local artifact.

        Args:
            indices: of the records, each at least 0.
            together: the records will be read at about the same time, so neighbours share a request.

        Returns:
            Bytes of the announced ranges.
        """
        if self.location.is_local:
            return 0
        places = [self._place(index) for index in indices]
        sidecars = self._sidecars.several({position for position, _ in places}, self._facts)
        # The reader evaluates these lazily, when their turn comes: other threads may have read some indices by then.
        fetcher, reader, sizes = fetcher_of(self.location), self._reader, sizes_of(sidecars.values())
        indices_of = (reader.index_ranges(one, self._specs) for one in sidecars.values())
        fetcher.expect(chain.from_iterable(indices_of), sizes, once=True)
        ranges = [one for position, at in places for one in reader.ranges(sidecars[position], at, self._specs)]
        fetcher.expect(sorted(ranges) if together else ranges, sizes)
        return sum(one.end - one.start for one in ranges)

    def fill(self, indices: Sequence[int]) -> None:
        """Fetch these records into the cache at low priority, after all expected ones, with large requests.

        Waits as `expect` does. Does nothing without a cache.
        """
        if not isinstance(self.location, CachedLocation) or self.location.is_local:
            return
        offsets: dict[int, list[int]] = {}
        for position, at in map(self._place, indices):
            offsets.setdefault(position, []).append(at)
        sidecars = self._sidecars.several(offsets, self._facts)
        partial = [one for position, one in sidecars.items() if len(offsets[position]) < len(one.records)]
        fetcher, reader, sizes = fetcher_of(self.location), self._reader, sizes_of(sidecars.values())
        indices_of = (reader.index_ranges(one, self._specs) for one in partial)
        fetcher.expect(chain.from_iterable(indices_of), sizes, once=True)
        rest = (reader.joined_ranges(one, offsets[position], self._specs) for position, one in sidecars.items())
        fetcher.fill(list(chain.from_iterable(rest)), sizes)

    @property
    def is_filled(self) -> bool:
        """Whether all that `fill` has announced is in the cache, so that it need not be announced to be read."""
        return self.location.is_local or fetcher_of(self.location).is_filled

    def expect_nothing(self) -> None:
        """Cancel all announced reads; threads that wait for one get a DatamergeError."""
        if not self.location.is_local:
            fetcher = fetcher_of(self.location)
            fetcher.forget_expected()
            fetcher.abandon()

    @property
    def cache_bytes(self) -> int:
        """Byte limit of the cache of a remote artifact; 0 without a cache."""
        location = self.location
        return location.cache.max_bytes if isinstance(location, CachedLocation) and not location.is_local else 0

    @property
    def bytes_read(self) -> int:
        """Estimated bytes of the files that hold the selected arrays; tar files count as a whole."""
        if not self.shard_sizes:
            return 0
        sidecar, store = self._sidecar(0), store_of(self.manifest.layout)
        names = {spec.name for spec in self._specs}
        specs_of = store.shard_files(sidecar.shard)
        read = sum(
            file.bytes for file in sidecar.files if names & {spec.name for spec in specs_of.get(file.path, ())}
        )
        return self.manifest.bytes * read // max(1, sum(file.bytes for file in sidecar.files))

    def _place(self, index: int) -> tuple[int, int]:
        position = bisect.bisect_right(self._starts, index) - 1
        return position, index - self._starts[position]

    def _sidecar(self, position: int) -> Sidecar:
        return self._sidecars.of(position, self._facts)

    @property
    def record_bytes(self) -> int:
        """Uncompressed bytes of the selected arrays of one record."""
        return sum(spec.nbytes for spec in self._specs)

    @property
    def sidecars_kept(self) -> int:
        """Number of shards whose sidecars stay in memory, so that a reader can alternate between them."""
        return self._sidecars.kept(self._facts)

    def shard_of(self, index: int) -> int:
        """Position in the manifest's list of the shard with record `index`, which is at least 0."""
        return self._place(index)[0]

    def indices(self, position: int) -> range:
        """Indices of the records of the shard at `position` in the manifest's list."""
        return range(self._starts[position], self._starts[position + 1])

    def commit(self, position: int) -> Commit:
        """Sidecar of the shard at `position` in the manifest's list."""
        return self._sidecars.commit(position)

    def commits(self) -> Iterator[Commit]:
        """Sidecars of all shards, in the order of the manifest; a remote artifact's are requested 16 at a time."""
        return self._sidecars.commits()

    def index_of(self, key: str) -> int:
        """Index of the record with this key; reads a few sidecars, and a small range of `keys.bin` if there is one.

        Raises:
            KeyError: no such key.
            CorruptShard: `keys.bin` or a sidecar is damaged.
        """
        position, offset = self._find(key)
        return int(self._starts[position]) + offset

    def _find(self, key: str) -> tuple[int, int]:
        index = self._listed(KEYS)
        if index is not None:
            return self._find_in(index, key)
        for position, span in enumerate(self.manifest.shards.column("key_range")):
            if span is None or not span[0] <= key <= span[1]:
                continue
            for offset, record in enumerate(self.commit(position).records):
                if record.key == key:
                    return position, offset
        raise KeyError(f"{self.location.url}: no record with key {key!r}")

    def _find_in(self, index: FileEntry, key: str) -> tuple[int, int]:
        """Look a key up in `keys.bin`, whose hash is checked before the key is reported as missing."""
        found = find(self.location, index, key, self.manifest, self.commit)
        if found is not None:
            return found
        if not self._index_is_sound:
            read_committed(self.location, KEYS, index.sha256)
            self._index_is_sound = True
        raise KeyError(f"{self.location.url}: no record with key {key!r}")

    def head(self) -> tuple[dict[str, Array], list[str]] | None:
        """The class head's tensors (see `parse_head`) and class names, if the artifact has one.

        Raises:
            SchemaError: the file is not a class head.
            CorruptShard: its bytes differ from the committed ones.
        """
        entry = self._listed(HEAD)
        if entry is None:
            return None
        return parse_head(read_committed(self.location, HEAD, entry.sha256), f"{self.location.url}/{HEAD}")

    def _listed(self, path: str) -> FileEntry | None:
        """The manifest's entry of a file that belongs to no shard."""
        return next((file for file in self.manifest.files if file.path == path), None)

    def _reset(self) -> None:
        self._sidecars = Sidecars(self.location, self.manifest, all=self._keeps_all)
        self._fetched_again: set[int] = set()
        self._reader = store_of(self.manifest.layout).reader(self.location)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_sidecars", "_reader")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __repr__(self) -> str:
        return one_line(self, self.location.url, *self.manifest.outline)

    def _repr_html_(self) -> str:
        """HTML for a notebook: facts, and the contact sheet if the artifact has an intact one."""
        layout = self.manifest.layout
        facts: dict[str, object] = {
            "groups": f"{len(self)}, in {len(self.shard_sizes)} of {layout.shards} shards",
            "bytes": f"{self.manifest.bytes:,}",
            "format": f"{layout.format}, {layout.encoding}",
            **{spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in layout.arrays},
        }
        sheet, entry = b"", self._listed(PREVIEW)
        if entry is not None and entry.bytes <= LARGEST_SHEET:
            with suppress(DatamergeError, OSError):  # show the facts anyway
                sheet = read_committed(self.location, PREVIEW, entry.sha256)
        return table(self.location.url, facts, sheet)
