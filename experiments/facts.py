"""Facts of an experiment: the results file with its provenance, and the size of the arrays that an arm reads."""

from __future__ import annotations

import json
import platform
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datamerge.runtime.checkout import commit
from storage_schemas import open_artifact


def write_accuracies(folder: Path, command: str, seeds: int, results: dict[str, Any]) -> None:
    """Write accuracies in % to FOLDER/results.json, with the command that made them, the commit and the hardware."""
    facts = {
        "command": f"python -m {command}",
        "commit": commit(),
        "hardware": f"{platform.machine()} CPU, 1 thread",
        "seeds": list(range(seeds)),
        "unit": "test accuracy, %",
        "results": results,
    }
    (folder / "results.json").write_text(json.dumps(facts, indent=1) + "\n")


def array_bytes(artifact: str, arrays: Collection[str]) -> int:
    """Compressed size in bytes of the given arrays of a Zarr artifact."""
    opened = open_artifact(artifact)
    files = (file for position in range(len(opened.shard_sizes)) for file in opened.commit(position).files)
    return sum(file.bytes for file in files if file.path.split("/")[1] in arrays)
