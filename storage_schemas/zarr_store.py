"""Shards inside one Zarr v3 store, `groups.zarr/`.

Row shard·groups_per_shard + i of every array is record i of a shard. The sharding codec makes one file per
array and shard (outer chunk) in which each group is its own inner chunk, compressed with blosc-zstd and
protected by crc32c. Rows that no group was written to (rejected ones) hold the fill value and count 0.

A shard is assembled in memory and its files are written whole: one writer per file, no partial writes.
zarr reads a missing file as fill values without an error, hence the sizes, hashes and checksums of the commit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import Store
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import FsspecStore, LocalStore, MemoryStore

from storage_schemas.errors import CorruptShard
from storage_schemas.location import Location
from storage_schemas.manifest import Commit, Layout
from storage_schemas.record import Array, Record

STORE = "groups.zarr"
UNLABELLED = -1


def metadata_files(layout: Layout) -> dict[str, bytes]:
    """The `zarr.json` files of the whole store, by path in the artifact."""
    store = MemoryStore()
    _create_arrays(store, layout)
    return _contents(store)


def encode_shard(
    layout: Layout, shard: int, records: Sequence[Record]
) -> tuple[dict[str, bytes], list[dict[str, int] | None]]:
    """The files of one shard, by path in the artifact. Zarr keeps offsets in its own shard index."""
    store = MemoryStore()
    arrays = _create_arrays(store, layout)
    metadata = set(_contents(store))
    rows = slice(shard * layout.groups_per_shard, shard * layout.groups_per_shard + len(records))
    if records:
        for spec in layout.arrays:
            arrays[spec.name][rows] = np.stack([record.arrays[spec.name] for record in records])
        arrays["count"][rows] = np.array([record.count for record in records], np.int64)
        arrays["label"][rows] = np.array(
            [UNLABELLED if record.label is None else record.label for record in records], np.int64
        )
    files = {path: data for path, data in _contents(store).items() if path not in metadata}
    return files, [None] * len(records)


class ZarrReader:
    """Reads records of committed shards through zarr-python."""

    def __init__(self, location: Location, layout: Layout) -> None:
        self._layout = layout
        self._group = zarr.open_group(_open_store(location), mode="r", zarr_format=3)

    def read(self, commit: Commit, index: int) -> dict[str, Array]:
        """Stored arrays of record `index` of a shard.

        Raises:
            CorruptShard: zarr cannot decode the record. (A missing file decodes to fill values here; the
                artifact's checksum catches that.)
        """
        row = commit.shard * self._layout.groups_per_shard + index
        try:
            return {spec.name: np.asarray(self._array(spec.name)[row]) for spec in self._layout.arrays}
        except Exception as error:  # codecs raise whatever they like; all of it means bad bytes
            raise CorruptShard(f"shard {commit.shard:05d}, record {index}: {error}") from error

    def _array(self, name: str) -> Any:
        return self._group[name]


def _create_arrays(store: Store, layout: Layout) -> dict[str, Any]:
    group = zarr.create_group(
        store,
        zarr_format=3,
        attributes={"datamerge": "row = shard * groups_per_shard + index; rows with count 0 hold no group"},
    )
    rows, per_shard = layout.groups, layout.groups_per_shard
    arrays: dict[str, Any] = {}
    for spec in layout.arrays:
        dtype = np.dtype(spec.dtype)
        arrays[spec.name] = group.create_array(
            name=spec.name,
            shape=(rows, *spec.shape),
            dtype=dtype,
            chunks=(1, *spec.shape),
            shards=(per_shard, *spec.shape),
            fill_value=np.nan if dtype.kind == "f" else int(np.iinfo(dtype).max),
            compressors=[
                BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize),
                Crc32cCodec(),
            ],
            config={"write_empty_chunks": True},
        )
    for name, fill in (("count", 0), ("label", UNLABELLED)):
        arrays[name] = group.create_array(
            name=name,
            shape=(rows,),
            dtype=np.dtype(np.int64),
            chunks=(per_shard,),
            fill_value=fill,
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
    return arrays


def _contents(store: MemoryStore) -> dict[str, bytes]:
    return {f"{STORE}/{key}": value.to_bytes() for key, value in sorted(store._store_dict.items())}


def _open_store(location: Location) -> Store:
    if location.is_local:
        return LocalStore(location.path(STORE), read_only=True)
    return FsspecStore.from_url(f"{location.url}/{STORE}", read_only=True)
