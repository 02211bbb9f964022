"""Shards as tar files, `shards/00000.tar`, in the WebDataset convention.

Record KEY consists of the consecutive members KEY.json, KEY.sum.npy, KEY.scatter.npy, … . Tar headers carry no times
or owners, so equal records give equal bytes. The commit stores the position of each array's raw data, so arrays are
read from a memory map without parsing the tar file.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from storage_schemas.access.block_file import Bytes
from storage_schemas.access.location import Location
from storage_schemas.access.pieces import Range
from storage_schemas.access.ranges import FileRanges
from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import ArraySpec, Layout
from storage_schemas.schema.packed import Sidecar, file_bytes
from storage_schemas.schema.record import Record
from storage_schemas.stores.base import ALL, Reader, ShardEncoder, Store, joined

# Bytes between two arrays (tar headers, a record's JSON) that cost less to fetch than another request.
HEADERS = 8 * 1024


class WebDatasetStore(Store):
    """One tar file per shard, with all of its arrays."""

    pattern, media_type = "shards/*.tar", "application/x-tar"

    def metadata_files(self) -> dict[str, bytes]:
        """Empty: each tar file is self-contained."""
        return {}

    def shard_files(self, shard: int) -> dict[str, tuple[ArraySpec, ...]]:
        return {_shard_file(shard): self.layout.arrays}

    def encoder(self, shard: int) -> WebDatasetEncoder:
        return WebDatasetEncoder(self.layout, shard)

    def reader(self, location: Location) -> WebDatasetReader:
        return WebDatasetReader(location)


class WebDatasetEncoder(ShardEncoder):
    """Builds the tar file of one shard record by record."""

    def __init__(self, layout: Layout, shard: int) -> None:
        self._arrays, self._path = layout.arrays, _shard_file(shard)
        self._buffer = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._buffer, mode="w", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - for `files`

    def add(self, record: Record) -> dict[str, int]:
        """Append a record; returns the offsets of its arrays in the file."""
        facts = {"count": record.count, "label": record.label, "samples": list(record.samples)}
        _add(self._tar, f"{record.key}.json", json.dumps(facts, sort_keys=True).encode())
        positions: dict[str, int] = {}
        for spec in self._arrays:
            stream = io.BytesIO()
            little = np.asarray(record.arrays[spec.name], dtype=spec.little_endian)
            np.lib.format.write_array(stream, np.ascontiguousarray(little), version=(1, 0), allow_pickle=False)
            end = _add(self._tar, f"{record.key}.{spec.name}.npy", stream.getvalue())
            positions[spec.name] = end - spec.nbytes
        return positions

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The tar file's path in the artifact and its contents."""
        self._tar.close()
        yield self._path, self._buffer.getvalue()


def _shard_file(shard: int) -> str:
    return f"shards/{shard:05d}.tar"


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a member and return the position where its data ends, before padding."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    header.mode = 0o644
    tar.addfile(header, io.BytesIO(data))
    padding = -len(data) % tarfile.BLOCKSIZE
    return int(tar.offset) - padding


class WebDatasetReader(Reader):
    """Reads records by offset, without parsing the tar file."""

    def __init__(self, location: Location) -> None:
        self._files = FileRanges(location)

    def read(
        self, commit: Sidecar, index: int, specs: Sequence[ArraySpec], rows: Mapping[str, slice] = ALL
    ) -> Iterator[Bytes]:
        """The bytes of arrays of record `index` of a shard; views of the file's memory map where it is local.

        Raises:
            CorruptShard: the tar file is missing or shorter than committed.
        """
        for path, start, end in self._ranges(commit, index, specs):
            yield self._files.read(path, start, end - start, file_bytes(commit, path))

    def ranges(self, commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> list[Range]:
        return list(self._ranges(commit, index, specs))

    def joined_ranges(self, commit: Sidecar, indices: Sequence[int], specs: Sequence[ArraySpec]) -> list[Range]:
        return joined((one for index in indices for one in self._ranges(commit, index, specs)), HEADERS)

    @staticmethod
    def _ranges(commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> Iterator[Range]:
        path, record = _shard_file(commit.shard), commit.records[index]
        for spec in specs:
            start = (record.offsets or {}).get(spec.name)
            if start is None:
                raise CorruptShard(f"{path}, record {record.key}: the commit has no offset for {spec.name}")
            yield Range(path, start, start + spec.nbytes)
