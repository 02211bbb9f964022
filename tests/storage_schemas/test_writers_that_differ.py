"""Two writers of one plan whose bytes differ, as on GPUs that add in any order: a shard comes from one of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import ArtifactWriter, Commit, Layout, Location, Record, open_artifact
from storage_schemas.verify import verify


class Turn(threading.Thread):
    """A commit that stops before every file that it writes, and before it looks for a sidecar."""

    def __init__(self, writer: ArtifactWriter, records: list[Record]) -> None:
        super().__init__()
        self._writer, self._records = writer, records
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.commit: Commit | None = None
        self.start()
        self._stopped.acquire()

    def run(self) -> None:
        self.stop()
        try:
            self.commit = self._writer.commit(0, self._records, [])
        finally:
            self._stopped.release()

    def stop(self) -> None:
        """Wait for the next turn."""
        self._stopped.release()
        self._go.acquire()

    def take(self) -> bool:
        """Go on until the next stop; returns whether there is one."""
        if self.commit is None:
            self._go.release()
            self._stopped.acquire()
        return self.commit is None


def _other(record: Record) -> Record:
    """The record with its first value changed in every array."""
    arrays: dict[str, Any] = {name: array.copy() for name, array in record.arrays.items()}
    for array in arrays.values():
        array.flat[0] ^= 1
    return replace(record, arrays=arrays)


def test_a_shard_comes_from_one_writer_in_any_order(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_layout: Callable[..., Layout],
    make_shards: Callable[..., list[list[Record]]],
    provenance: dict[str, Any],
    same_record: Callable[[Record, Record], None],
    format_name: str,
) -> None:
    layout = make_layout(format_name, extras=(), groups=3)
    ours = make_shards(layout)[0]
    theirs = [_other(record) for record in ours]
    write, read = Location.write, Location.read

    def writing(location: Location, path: str, data: bytes) -> None:
        if isinstance(turn := threading.current_thread(), Turn) and not path.startswith("commits/"):
            turn.stop()
        write(location, path, data)

    def reading(location: Location, path: str, *span: Any) -> bytes:
        if isinstance(turn := threading.current_thread(), Turn):
            turn.stop()
        return read(location, path, *span)

    monkeypatch.setattr(Location, "write", writing)
    monkeypatch.setattr(Location, "read", reading)
    # Both look for a sidecar and write the files without pixels; then the remaining calls come in every order.
    before, left = (4, 3) if format_name == "zarr" else (2, 2)
    for order in sorted(set(itertools.permutations("a" * left + "b" * left))):
        folder = tmp_path / "".join(order)
        writers = [ArtifactWriter(Location(folder), layout, provenance) for _ in range(2)]
        writers[0].begin({})
        turns = {"a": Turn(writers[0], ours), "b": Turn(writers[1], theirs)}
        for name in [*"ab" * before, *order]:
            turns[name].take()
        for turn in turns.values():
            while turn.take():  # has found the other's sidecar
                pass
            turn.join()
        writers[0].finish()
        assert verify(Location(folder)).problems == [], order
        found = list(open_artifact(folder))
        first = ours if np.array_equal(found[0].arrays["sum"], ours[0].arrays["sum"]) else theirs
        for record, expected in zip(found, first, strict=True):
            same_record(record, expected)
