"""`keys.bin`: an index of keys, for artifacts whose groups are shuffled, so that most shards may hold a key.

    {hash: uint32, row: uint64} of every record, little endian, ascending: `hash` is the first four bytes of the
    sha256 of the key, as a big-endian number, and `row` is shard · groups_per_shard + position in the shard

Hashes are uniformly distributed, so a key's entry is near the fraction hash / 2³² of the file: one small range is
read, whatever the size of the artifact. Entries with the same hash are candidates; their sidecars decide.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from storage_schemas.access.location import Location
from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import KEYS, Commit, FileEntry, Manifest

ENTRY = np.dtype([("hash", "<u4"), ("row", "<u8")])
HASHES = 2**32
# The index is written if a lookup by the manifest's key ranges would read more sidecars than this on average.
MOST_SIDECARS = 4


class KeyIndex:
    """Builds `keys.bin` from sidecars; takes 4 bytes per record in memory until `files` is called."""

    def __init__(self) -> None:
        self._found: list[tuple[int, npt.NDArray[np.uint32]]] = []

    def add(self, commit: Commit) -> None:
        """Add the keys of a shard."""
        hashes = np.fromiter((key_hash(record.key) for record in commit.records), np.uint32, len(commit.records))
        self._found.append((commit.shard, hashes))

    def files(self, manifest: Manifest) -> dict[str, bytes]:
        """The index by path; empty if the key ranges in the manifest suffice."""
        if sidecars_of_a_lookup(manifest) <= MOST_SIDECARS:
            return {}
        entries = np.empty(sum(len(hashes) for _, hashes in self._found), ENTRY)
        start = 0
        for shard, hashes in self._found:
            part = entries[start : start + len(hashes)]
            part["hash"] = hashes
            part["row"] = np.arange(len(hashes), dtype=np.uint64) + shard * manifest.layout.groups_per_shard
            start += len(hashes)
        entries = entries[np.lexsort((entries["row"], entries["hash"]))]
        return {KEYS: entries.tobytes()}


def sidecars_of_a_lookup(manifest: Manifest) -> float:
    """Number of shards whose key range contains a key, averaged over the first key of every shard."""
    ranges = [span for span in manifest.shards.column("key_range") if span is not None]
    least, greatest = sorted(low for low, _ in ranges), sorted(high for _, high in ranges)
    holding = sum(bisect_right(least, key) - bisect_left(greatest, key) for key in least)
    return holding / len(ranges) if ranges else 0.0


def key_hash(key: str) -> int:
    """Hash of a key in the index: the first four bytes of its sha256, big endian."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")


def find(
    location: Location, entry: FileEntry, key: str, manifest: Manifest, commit: Callable[[int], Commit]
) -> tuple[int, int] | None:
    """Position in the manifest's list of the shard with a key, and that of its record in the shard; None if unknown.

    Args:
        location: of the artifact.
        entry: the manifest's entry of the index.
        key: to look up.
        manifest: of the artifact.
        commit: gives the sidecar of the shard at a position.

    Raises:
        CorruptShard: the index or a sidecar is damaged.
    """
    numbers = manifest.shards.column("shard")
    for row in rows_of(location, entry, key):
        shard, offset = divmod(row, manifest.layout.groups_per_shard)
        position = bisect_left(numbers, shard)
        if position < len(numbers) and numbers[position] == shard:
            records = commit(position).records
            if offset < len(records) and records[offset].key == key:
                return position, offset
    return None


def rows_of(location: Location, entry: FileEntry, key: str) -> Iterator[int]:
    """Rows that may hold a key. If the index is intact and the artifact has the key, one of them does.

    Args:
        location: of the artifact.
        entry: the manifest's entry of the index.
        key: to look up.

    Raises:
        CorruptShard: the file is missing or has another length.
    """
    count, target = entry.bytes // ENTRY.itemsize, key_hash(key)
    # Four standard deviations of the entry's position, at most √count / 2 each.
    reach = 2 * math.isqrt(count) + 64
    start = max(0, target * count // HASHES - reach)
    stop = min(count, start + 2 * reach)
    while True:
        part = _read(location, start, stop)
        before, after = start > 0 and part["hash"][0] >= target, stop < count and part["hash"][-1] <= target
        if not before and not after:
            break
        reach *= 2
        start, stop = max(0, start - reach * before), min(count, stop + reach * after)
    yield from part["row"][part["hash"] == target].tolist()


def _read(location: Location, start: int, stop: int) -> npt.NDArray[np.void]:
    size = (stop - start) * ENTRY.itemsize
    try:
        data = location.read(KEYS, start * ENTRY.itemsize, stop * ENTRY.itemsize)
    except FileNotFoundError:
        raise CorruptShard(f"{location.url}/{KEYS}: the manifest lists this file, it is missing") from None
    if len(data) != size:
        raise CorruptShard(f"{location.url}/{KEYS}: expected {size} bytes at {start}, found {len(data)}")
    return np.frombuffer(data, ENTRY)
