"""What a physical form of an artifact offers to those who write, read and check artifacts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

from storage_schemas.access.blocks import Bytes
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
        """Take in a copy of the next record.

        Returns:
            The positions of its arrays in the shard's file, by name; None for a store that finds them itself.
        """

    @abstractmethod
    def files(self) -> Iterator[tuple[str, bytes]]:
        """Each file's path in the artifact and its contents; nothing can be added afterwards."""


class Reader(ABC):
    """Reads the bytes of single records, and says beforehand where they are. Threads may share one."""

    @abstractmethod
    def read(
        self, commit: Sidecar, index: int, specs: Sequence[ArraySpec], rows: Mapping[str, slice] = ALL
    ) -> Iterator[Bytes]:
        """The bytes of some arrays of record `index` of a shard, in the order of `specs`.

        Of an array that `rows` names a store may give those rows alone, if it has compared them with a checksum.

        Raises:
            CorruptShard: a file is missing or cut short, or what it holds cannot be such a record.
        """

    def index_ranges(self, commit: Sidecar, specs: Sequence[ArraySpec]) -> list[Range]:
        """What has to be read of a shard, and was not yet, before `ranges` can tell where its records are."""
        return []

    @abstractmethod
    def ranges(self, commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> list[Range]:
        """What `read` asks for: a range an array.

        Raises:
            CorruptShard: as `read`.
        """

    @abstractmethod
    def joined_ranges(self, commit: Sidecar, indices: Sequence[int], specs: Sequence[ArraySpec]) -> list[Range]:
        """What reading these arrays of some records of a shard asks for, in few ranges.

        Raises:
            CorruptShard: as `read`.
        """


class Store(ABC):
    """One physical form, for one layout. A new one is a class like this and a line in `STORES`.

    Attributes:
        pattern: matches the paths of the shards' files in the artifact.
        media_type: of these files.
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
        """An encoder of one shard that has taken in nothing yet."""

    @abstractmethod
    def reader(self, location: Location) -> Reader:
        """A reader of an artifact at a location."""


def joined(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The same bytes in fewer ranges, by path and position; up to `gap` bytes between two of them come with them."""
    merged: list[Range] = []
    for one in sorted(ranges):
        last = merged[-1] if merged else None
        if last is not None and one.path == last.path and one.start <= last.end + gap:
            merged[-1] = last._replace(end=max(last.end, one.end))
        else:
            merged.append(one)
    return merged
