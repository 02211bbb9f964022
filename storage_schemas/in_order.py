"""Reading records in an order known in advance; records of a remote artifact are prefetched."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import TYPE_CHECKING

from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.access.threads import AHEAD, in_threads
from storage_schemas.errors import DatamergeError
from storage_schemas.schema.record import Record

if TYPE_CHECKING:
    from storage_schemas.artifact import Artifact

WINDOW = 64 * 2**20  # bytes of records that are announced at a time
BLOCKS = AHEAD + 2  # per window: one is read, AHEAD are announced, one is being announced
MOST = 4096  # records in a block
SMALLEST = 16  # ratio of the sizes of the largest and the first block


def in_order(artifact: Artifact, indices: Iterable[int], window: int = WINDOW) -> Generator[Record, None, None]:
    """The records with these indices, at least 0, in this order.

    Records of a remote artifact are announced (`Artifact.expect`) block by block, in a thread that waits for sidecars
    and shard indices while earlier blocks are fetched and read. The first blocks are small, so that they arrive soon.

    Args:
        artifact: that holds the records.
        indices: each at least 0; consumed some blocks ahead.
        window: bytes of records that are announced at a time.

    Raises:
        CorruptShard, DatamergeError: a record cannot be read.
    """
    if artifact.location.is_local:
        yield from map(artifact.part, indices)
        return

    def expected(block: list[int]) -> list[int]:
        with suppress(DatamergeError, OSError):  # the read of the record raises it again
            artifact.expect(block, together=True)
        return block

    most = min(MOST, max(1, window // BLOCKS // max(1, artifact.record_bytes)))
    try:
        with in_threads(1, expected, _blocks(artifact, indices, most)) as blocks:
            for block in blocks:
                yield from map(artifact.part, block)
    except BaseException:  # the rest will not be read
        fetcher_of(artifact.location).forget_expected()
        raise


def _blocks(artifact: Artifact, indices: Iterable[int], most: int) -> Iterator[list[int]]:
    """Split indices into blocks of at most `most`, with few enough shards that their sidecars stay in memory."""
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
