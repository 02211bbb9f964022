"""What every results.json says besides the results."""

from __future__ import annotations

import subprocess
from collections.abc import Collection
from pathlib import Path

from storage_schemas import open_artifact


def commit() -> str:
    """The commit of this checkout, short."""
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip()


def array_bytes(artifact: str, arrays: Collection[str]) -> int:
    """Compressed bytes of some arrays of a Zarr artifact."""
    opened = open_artifact(artifact)
    files = (file for position in range(len(opened.shard_sizes)) for file in opened.commit(position).files)
    return sum(file.bytes for file in files if file.path.split("/")[1] in arrays)
