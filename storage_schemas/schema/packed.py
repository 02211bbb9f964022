"""Sidecars packed into arrays: readers in random order keep thousands of them in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np

from storage_schemas.schema.manifest import Commit, FileEntry, RecordEntry

NO_LABEL = np.iinfo(np.int64).min  # below every valid label


class PackedRecords(Sequence[RecordEntry]):
    """The record entries of a commit, at about 100 bytes each; `facts` adds the JSON of `samples` and `info`."""

    def __init__(self, records: Sequence[RecordEntry], *, facts: bool = False) -> None:
        self._names = sorted({name for record in records for name in (*record.checksums, *(record.offsets or ()))})
        self._keys = np.array([record.key.encode() for record in records], np.bytes_)
        self._counts = np.array([record.count for record in records], np.int64)
        labels = [NO_LABEL if record.label is None else record.label for record in records]
        self._labels = np.array(labels, np.int64)
        sums = [[int(record.checksums.get(name, "-1"), 16) for name in self._names] for record in records]
        self._checksums = np.array(sums, np.int64)
        offsets = [[(record.offsets or {}).get(name, -1) for name in self._names] for record in records]
        self._offsets = np.array(offsets, np.int64) if any(record.offsets for record in records) else None
        self._facts = [json.dumps([record.samples, record.info]).encode() for record in records] if facts else None

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> RecordEntry: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[RecordEntry]: ...
    def __getitem__(self, index: int | slice) -> RecordEntry | Sequence[RecordEntry]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        global _LAST
        last = _LAST
        if last is None or last[0] is not self or last[1] != index:
            last = _LAST = self, index, self._entry(index)
        return last[2]

    def _entry(self, index: int) -> RecordEntry:
        label = int(self._labels[index])
        sums = zip(self._names, self._checksums[index].tolist(), strict=True)
        offsets = None if self._offsets is None else zip(self._names, self._offsets[index].tolist(), strict=True)
        samples, info = json.loads(self._facts[index]) if self._facts is not None else ((), {})
        return RecordEntry.model_construct(
            key=self._keys[index].decode(),
            count=int(self._counts[index]),
            label=None if label == NO_LABEL else label,
            samples=tuple(samples),
            checksums={name: f"{value:08x}" for name, value in sums if value >= 0},
            offsets=None if offsets is None else {name: value for name, value in offsets if value >= 0},
            info=info,
        )


# The entry that was asked for last, because readers of a record ask for its entry several times. It is replaced as a
# whole, so any thread may read it.
_LAST: tuple[PackedRecords, int, RecordEntry] | None = None


class PackedCommit:
    """The part of a `Commit` that readers of records need.

    Attributes:
        shard: number of the shard.
        files: the shard's files.
        records: entries; without `facts` their `samples` and `info` are empty, which readers of arrays do not need.
    """

    def __init__(self, commit: Commit, *, facts: bool = False) -> None:
        self.shard: int = commit.shard
        self.files: tuple[FileEntry, ...] = commit.files
        self.records = PackedRecords(commit.records, facts=facts)


Sidecar = Commit | PackedCommit


def file_bytes(sidecar: Sidecar, path: str) -> int:
    """Bytes of a shard's file according to its sidecar; 0 if the sidecar does not list it."""
    return next((file.bytes for file in sidecar.files if file.path == path), 0)


def sizes_of(sidecars: Iterable[Sidecar]) -> dict[str, int]:
    """Bytes of the shards' files, by path."""
    return {file.path: file.bytes for sidecar in sidecars for file in sidecar.files}
