"""Size of the arrays that an arm reads."""

from __future__ import annotations

from collections.abc import Collection

from storage_schemas import open_artifact


def array_bytes(artifact: str, arrays: Collection[str]) -> int:
    """Compressed size in bytes of the given arrays of a Zarr artifact."""
    opened = open_artifact(artifact)
    files = (file for position in range(len(opened.shard_sizes)) for file in opened.commit(position).files)
    return sum(file.bytes for file in files if file.path.split("/")[1] in arrays)
