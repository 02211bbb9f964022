"""The arrays of a record, as its shard holds them."""

from __future__ import annotations

from collections.abc import Sequence

from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import ArraySpec
from storage_schemas.schema.packed import Sidecar
from storage_schemas.schema.record import Array, crc32c
from storage_schemas.stores.base import Reader


def read_arrays(
    reader: Reader, commit: Sidecar, index: int, specs: Sequence[ArraySpec], check: bool
) -> dict[str, Array]:
    """Arrays of record `index` of a shard, compared with their checksums if `check`.

    Raises:
        CorruptShard: names the record and the first array that is not as it was committed.
    """
    arrays: dict[str, Array] = {}
    record = commit.records[index]
    for spec, data in zip(specs, reader.read(commit, index, specs), strict=True):
        if check and (found := crc32c(data)) != record.checksums.get(spec.name):
            raise CorruptShard(
                f"shard {commit.shard:05d}, record {record.key}: {spec.name} has crc32c {found}, "
                f"expected {record.checksums.get(spec.name)}"
            )
        arrays[spec.name] = data.view(spec.little_endian).astype(spec.dtype, copy=False).reshape(spec.shape)
    return arrays
