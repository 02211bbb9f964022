"""Interface of a physical format: writing, reading and locating the arrays of shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from storage_schemas.access.block_file import Bytes
from storage_schemas.access.location import Location
from storage_schemas.access.pieces import Range
from storage_schemas.schema.manifest import ArraySpec, Layout
from storage_schemas.schema.packed import Sidecar
from storage_schemas.schema.record import Record

ALL: Mapping[str, slice] = MappingProxyType({})


class ShardEncoder(ABC):
    """Turns the records of one shard into its files."""

    @abstractmethod
    def add(self, record: Record) -> dict[str, int] | None:
        """Copy the next record into the shard.

        Returns:
            The positions of its arrays in the shard's file, by name; None for a format with its own index.
        """

    @abstractmethod
    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield each file's path in the artifact and its contents; nothing can be added afterwards."""


class Reader(ABC):
    """Reads the bytes of single records, and locates them for prefetching. Thread-safe."""

    @abstractmethod
    def read(
        self, commit: Sidecar, index: int, specs: Sequence[ArraySpec], rows: Mapping[str, slice] = ALL
    ) -> Iterator[Bytes]:
        """The bytes of some arrays of record `index` of a shard, in the order of `specs`.

        For an array in `rows` a reader may return only these rows, if it has checked them itself; else all of it.

        Raises:
            CorruptShard: a file is missing or cut short, or its contents cannot be such a record.
        """

    def index_ranges(self, commit: Sidecar, specs: Sequence[ArraySpec]) -> list[Range]:
        """Ranges of a shard, not read yet, that `ranges` needs to locate its records."""
        return []

    @abstractmethod
    def ranges(self, commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> list[Range]:
        """The ranges that `read` requests, one per array.

        Raises:
            CorruptShard: as `read`.
        """

    @abstractmethod
    def joined_ranges(self, commit: Sidecar, indices: Sequence[int], specs: Sequence[ArraySpec]) -> list[Range]:
        """The ranges of these arrays in some records of a shard, joined into few ranges.

        Raises:
            CorruptShard: as `read`.
        """


class Store(ABC):
    """One physical format, for one layout. A new format is a subclass and an entry in `STORES`.

    Attributes:
        pattern: glob pattern of the shards' files in the artifact.
        media_type: MIME type of these files.
    """

    pattern: ClassVar[str]
    media_type: ClassVar[str]

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def metadata_files(self) -> dict[str, bytes]:
        """The files that belong to no single shard, by path in the artifact."""

    @abstractmethod
    def shard_files(self, shard: int) -> dict[str, tuple[ArraySpec, ...]]:
        """The paths of a shard's files, and the arrays whose data each holds."""

    @abstractmethod
    def encoder(self, shard: int) -> ShardEncoder:
        """An empty encoder of one shard."""

    @abstractmethod
    def reader(self, location: Location) -> Reader:
        """A reader of an artifact at a location."""


def joined(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """Join ranges of a file that overlap or lie at most `gap` bytes apart; sorted by path and position."""
    merged: list[Range] = []
    for one in sorted(ranges):
        last = merged[-1] if merged else None
        if last is not None and one.path == last.path and one.start <= last.end + gap:
            merged[-1] = last._replace(end=max(last.end, one.end))
        else:
            merged.append(one)
    return merged
