"""Deliberate changes to an artifact, with all hashes and seals updated to match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_schemas.schema.manifest import UNSEALED


def sealed(document: dict[str, Any]) -> bytes:
    data = json.dumps({**document, "self_sha256": UNSEALED}).encode()
    return data.replace(UNSEALED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def forge(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "manifest.json") -> None:
    """Change a document and update all hashes of files."""
    document = json.loads((folder / file).read_bytes())
    change(document)
    data = sealed(document)
    (folder / file).write_bytes(data)
    if file != "manifest.json":
        position = int(Path(file).stem)

        def hash_of_commit(manifest: dict[str, Any]) -> None:
            manifest["shards"][position]["commit_sha256"] = hashlib.sha256(data).hexdigest()

        forge(folder, hash_of_commit)


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replace the bytes of a shard's file and update all hashes."""
    (folder / name).write_bytes(data)
    for commit in sorted((folder / "commits").iterdir()):

        def hash_of_file(document: dict[str, Any]) -> None:
            for entry in document["files"]:
                if entry["path"] == name:
                    entry["sha256"], entry["bytes"] = hashlib.sha256(data).hexdigest(), len(data)

        forge(folder, hash_of_file, f"commits/{commit.name}")
