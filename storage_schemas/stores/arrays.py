"""Reading and checking the arrays of a record in its shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import ArraySpec
from storage_schemas.schema.packed import Sidecar
from storage_schemas.schema.record import Array, crc32c
from storage_schemas.stores.base import Reader

# Number of members of a record → the rows to read of some of its arrays, by name.
Rows = Callable[[int], Mapping[str, slice]]


def read_arrays(
    reader: Reader,
    commit: Sidecar,
    index: int,
    specs: Sequence[ArraySpec],
    check: bool,
    rows: Rows | None = None,
) -> dict[str, Array]:
    """Arrays of record `index` of a shard, by name.

    Args:
        reader: of the artifact.
        commit: sidecar of the shard.
        index: position of the record in the shard.
        specs: the arrays to read.
        check: compare each array with its checksum.
        rows: rows to read of some arrays; all of the others. In a tar file the array is still read and checked as a
            whole. In Zarr only the blocks with these rows are decompressed, and the crc32c of the compressed chunk is
            checked instead.

    Raises:
        CorruptShard: names the record and the first array that differs from what was committed.
    """
    arrays: dict[str, Array] = {}
    record = commit.records[index]
    selected = {} if rows is None else rows(record.count)
    for spec, data in zip(specs, reader.read(commit, index, specs, selected), strict=True):
        is_whole = len(data) == spec.nbytes
        if check and is_whole and (found := crc32c(data)) != record.checksums.get(spec.name):
            raise CorruptShard(
                f"shard {commit.shard:05d}, record {record.key}: {spec.name} has crc32c {found}, "
                f"expected {record.checksums.get(spec.name)}"
            )
        array = data.view(spec.little_endian).astype(spec.dtype, copy=False).reshape(-1, *spec.shape[1:])
        arrays[spec.name] = array[selected[spec.name]] if is_whole and spec.name in selected else array
    return arrays
