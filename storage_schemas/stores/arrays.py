"""The arrays of a record, as its shard holds them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import ArraySpec
from storage_schemas.schema.packed import Sidecar
from storage_schemas.schema.record import Array, crc32c
from storage_schemas.stores.base import Reader

# By the number of a record's members, the rows of some of its arrays.
Rows = Callable[[int], Mapping[str, slice]]


def read_arrays(
    reader: Reader,
    commit: Sidecar,
    index: int,
    specs: Sequence[ArraySpec],
    check: bool,
    rows: Rows | None = None,
) -> dict[str, Array]:
    """Arrays of record `index` of a shard, compared with their checksums if `check`.

    Of arrays that `rows` names those rows alone. A tar file's are read and checked as a whole; of Zarr's, the blocks
    that hold the rows are decompressed, and what is checked is the crc32c of the compressed chunk.

    Raises:
        CorruptShard: names the record and the first array that is not as it was committed.
    """
    arrays: dict[str, Array] = {}
    record = commit.records[index]
    wanted = {} if rows is None else rows(record.count)
    for spec, data in zip(specs, reader.read(commit, index, specs, wanted), strict=True):
        is_whole = len(data) == spec.nbytes
        if check and is_whole and (found := crc32c(data)) != record.checksums.get(spec.name):
            raise CorruptShard(
                f"shard {commit.shard:05d}, record {record.key}: {spec.name} has crc32c {found}, "
                f"expected {record.checksums.get(spec.name)}"
            )
        array = data.view(spec.little_endian).astype(spec.dtype, copy=False).reshape(-1, *spec.shape[1:])
        arrays[spec.name] = array[wanted[spec.name]] if is_whole and spec.name in wanted else array
    return arrays
