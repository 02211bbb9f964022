"""Records in an order that is known beforehand; those of a remote artifact are fetched before they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from storage_schemas.access.fetching import fetcher_of
from storage_schemas.access.threads import AHEAD, in_threads
from storage_schemas.errors import DatamergeError
from storage_schemas.schema.record import Record

if TYPE_CHECKING:
    from storage_schemas.artifact import Artifact

WINDOW = 64 * 2**20  # bytes of records that are expected at a time
BLOCKS = AHEAD + 2  # of a window: the one that is read, those that are expected, one that is being
MOST = 4096  # records of a block
SMALLEST = 16  # the first block is so much smaller than the largest


def in_order(artifact: Artifact, indices: Iterable[int], window: int = WINDOW) -> Generator[Record, None, None]:
    """The records with these indices, at least 0, in this order.

    Of a remote artifact they are expected block by block, in a thread that waits for sidecars and shard indices
    while the blocks before are fetched and read. The first ones are small, so that they come soon.

    Args:
        artifact: that has them.
        indices: taken some blocks ahead.
        window: bytes of records that are expected at a time.

    Raises:
        CorruptShard, DatamergeError: one cannot be read.
    """
    if artifact.location.is_local:
        yield from map(artifact.part, indices)
        return

    def expected(block: list[int]) -> list[int]:
        with suppress(DatamergeError, OSError):  # who reads it is told
            artifact.expect(block, together=True)
        return block

    most = min(MOST, max(1, window // BLOCKS // max(1, artifact.record_bytes)))
    try:
        with in_threads(1, expected, _blocks(artifact, indices, most)) as blocks:
            for block in blocks:
                yield from map(artifact.part, block)
    finally:
        fetcher_of(artifact.location).forget_expected()


def _blocks(artifact: Artifact, indices: Iterable[int], most: int) -> Iterator[list[int]]:
    """Indices in blocks of at most so many, of no more shards than have their sidecars kept until they are read."""
    rest, count = iter(indices), -(-most // SMALLEST)
    shards = max(1, artifact.sidecars_kept // (2 * BLOCKS))
    while block := list(islice(rest, count)):
        first, seen = 0, set[int]()
        for place, index in enumerate(block):
            seen.add(artifact.shard_of(index))
            if len(seen) > shards:
                yield block[first:place]
                first, seen = place, {artifact.shard_of(index)}
        yield block[first:]
        count = min(2 * count, most)
