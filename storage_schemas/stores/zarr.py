"""Shards inside one Zarr v3 store, `groups.zarr/`.

Row shard·groups_per_shard + i of every array is record i of a shard. The sharding codec makes one file per array and
shard (outer chunk), in which each group is an inner chunk of its own, compressed with blosc-zstd and protected by
crc32c. Rows without a group (rejected groups) hold the fill value and count 0.

A shard is assembled in memory and its files are written whole: one writer per file, no partial writes. Zarr reads a
missing file as fill values without an error, which is why the commit stores sizes, hashes and checksums.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr
from numcodecs import Blosc
from zarr.abc.buffer import Buffer
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from storage_schemas.access.block_file import Bytes
from storage_schemas.access.location import Location
from storage_schemas.access.once import Once
from storage_schemas.access.pieces import Range
from storage_schemas.access.ranges import FileRanges
from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import ArraySpec, Layout
from storage_schemas.schema.packed import Sidecar, file_bytes
from storage_schemas.schema.record import Record
from storage_schemas.stores.base import ALL, Reader, ShardEncoder, Store, joined
from storage_schemas.stores.blosc_blocks import decoded_part

FOLDER = "groups.zarr"
UNLABELLED = -1
CRC_BYTES = 4
# Records whose entries in shard indices are cached, at 16 bytes per record and array: 64 MiB.
CACHED_RECORDS = 2**22
# Names of the axes of stored arrays, for readers such as xarray.
PIXELS = ("channel", "height", "width")
AXES = {
    "target": ("group", "embedding"),
    "members": ("group", "member", *PIXELS),
    "factors": ("group", "factor", *PIXELS),
}
# Generous bound of the bytes that blosc adds to incompressible data; far below the index's mark for "not written".
MAX_CHUNK_OVERHEAD = 4096
_BLOSC = Blosc()  # decoding depends on the data alone, not on these defaults


class ZarrStore(Store):
    """One Zarr store for all shards; each shard has one file per array."""

    pattern, media_type = f"{FOLDER}/*", "application/vnd+zarr"

    def metadata_files(self) -> dict[str, bytes]:
        """The `zarr.json` files of the whole store."""
        files: dict[str, Buffer] = {}
        _create_arrays(files, self.layout)
        return _contents(files)

    def shard_files(self, shard: int) -> dict[str, tuple[ArraySpec, ...]]:
        """One file per array. `count` and `label` have files too, but no spec: readers take both from the sidecar."""
        arrays = {_shard_file(spec.name, shard, len(spec.shape)): (spec,) for spec in self.layout.arrays}
        return {**arrays, **{_shard_file(name, shard, 0): () for name in ("count", "label")}}

    def encoder(self, shard: int) -> ZarrEncoder:
        return ZarrEncoder(self.layout, shard)

    def reader(self, location: Location) -> ZarrReader:
        return ZarrReader(location, self.layout)


class ZarrEncoder(ShardEncoder):
    """Collects the records of one shard by array, and compresses one array after the other."""

    def __init__(self, layout: Layout, shard: int) -> None:
        self._layout, self._first, self._filled = layout, shard * layout.groups_per_shard, 0
        # `empty` reserves address space only: rows that are never filled take no memory.
        self._rows = {
            spec.name: np.empty((layout.groups_per_shard, *spec.shape), spec.dtype) for spec in layout.arrays
        }
        self._rows |= {name: np.empty(layout.groups_per_shard, np.int64) for name in ("count", "label")}

    def add(self, record: Record) -> None:
        """Copy the next record into the rows. Returns None: Zarr has its own shard index."""
        facts = {"count": record.count, "label": UNLABELLED if record.label is None else record.label}
        for name, rows in self._rows.items():
            rows[self._filled] = facts[name] if name in facts else record.arrays[name]
        self._filled += 1

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Yield each file's path in the artifact and its contents; frees the rows of each array once encoded."""
        files: dict[str, Buffer] = {}
        arrays = _create_arrays(files, self._layout)
        metadata = set(files)
        for name in sorted(self._rows) if self._filled else ():
            rows = self._rows.pop(name)[: self._filled]
            arrays[name][self._first : self._first + self._filled] = rows
            del rows
            yield from _contents({path: files.pop(path) for path in files.keys() - metadata}).items()


class ZarrReader(Reader):
    """Reads single inner chunks: the shard's index once, then one range per array.

    zarr-python takes 25 ms for a small record (four arrays, one event loop each). We read the index of the sharding
    codec directly, whose format the Zarr v3 specification fixes; this adds nothing to reading and decompression.
    """

    def __init__(self, location: Location, layout: Layout) -> None:
        self._files = FileRanges(location)
        self._layout = layout
        self._indices = Once[str, npt.NDArray[np.uint64]](-(-CACHED_RECORDS // layout.groups_per_shard))

    def read(
        self, commit: Sidecar, index: int, specs: Sequence[ArraySpec], rows: Mapping[str, slice] = ALL
    ) -> Iterator[Bytes]:
        """The bytes of arrays of record `index` of a shard.

        Raises:
            CorruptShard: a file is missing, cut short, or fails its crc32c.
        """
        for spec, place in zip(specs, self._ranges(commit, index, specs), strict=True):
            size = place.end - place.start
            data = self._files.read(place.path, place.start, size, file_bytes(commit, place.path))
            yield _decoded(data, spec, f"{place.path}, record {index}", rows.get(spec.name))

    def index_ranges(self, commit: Sidecar, specs: Sequence[ArraySpec]) -> list[Range]:
        paths = [path for path in self._paths(commit, specs) if path not in self._indices]
        places = (self._index_range(path, file_bytes(commit, path)) for path in paths)
        return [place for place in places if place.start >= 0]

    def ranges(self, commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> list[Range]:
        return list(self._ranges(commit, index, specs))

    def joined_ranges(self, commit: Sidecar, indices: Sequence[int], specs: Sequence[ArraySpec]) -> list[Range]:
        if len(indices) < len(commit.records):
            return joined(one for index in indices for one in self._ranges(commit, index, specs))
        # All records: read whole files, without their indices.
        return [Range(path, 0, file_bytes(commit, path)) for path in self._paths(commit, specs)]

    @staticmethod
    def _paths(commit: Sidecar, specs: Sequence[ArraySpec]) -> list[str]:
        return [_shard_file(spec.name, commit.shard, len(spec.shape)) for spec in specs]

    def _ranges(self, commit: Sidecar, index: int, specs: Sequence[ArraySpec]) -> Iterator[Range]:
        for spec, path in zip(specs, self._paths(commit, specs), strict=True):
            start, size = (int(value) for value in self._index(path, file_bytes(commit, path))[index])
            if size > MAX_CHUNK_OVERHEAD + 2 * spec.nbytes:  # also the mark of an inner chunk that was never written
                raise CorruptShard(f"{path}, record {index}: the shard index has no such record")
            yield Range(path, start, start + size)

    def _index(self, path: str, file_size: int) -> npt.NDArray[np.uint64]:
        """(offset, size) of every inner chunk, uint64 [chunks, 2]: the end of the file, followed by its crc32c."""

        def read() -> npt.NDArray[np.uint64]:
            place = self._index_range(path, file_size)
            if place.start < 0:
                raise CorruptShard(f"{path}: expected at least {place.end - place.start} bytes, found {file_size}")
            data = self._files.read(path, place.start, place.end - place.start, file_size)
            payload = _checked(data, f"{path}, shard index")
            return payload.view("<u8").astype(np.uint64).reshape(-1, 2)

        return self._indices.get(path, read)

    def _index_range(self, path: str, file_size: int) -> Range:
        """The range of a shard's index; `start` is negative if the file is too short to have one."""
        return Range(path, file_size - 16 * self._layout.groups_per_shard - CRC_BYTES, file_size)


def _decoded(data: Bytes, spec: ArraySpec, where: str, rows: slice | None = None) -> Bytes:
    """The bytes of the array in a stored inner chunk, or of some of its rows."""
    payload = _checked(data, where)
    # Bytes 4 to 8 of Blosc's header state the decompressed size: checking it first refuses decompression bombs.
    # Bytes 12 to 16 state the compressed size, which the decoder trusts: it could read beyond the end of the buffer.
    declared, own = (int.from_bytes(payload[at : at + 4].tobytes(), "little") for at in (4, 12))
    if (declared, own) != (spec.nbytes, len(payload)):
        raise CorruptShard(
            f"{where}: expected {spec.nbytes} bytes of {len(payload)} compressed, the header says {declared} of {own}"
        )
    try:
        if rows is not None:
            row = spec.nbytes // spec.shape[0]
            start, stop, _ = rows.indices(spec.shape[0])
            return decoded_part(payload, start * row, stop * row)
        return np.frombuffer(_BLOSC.decode(payload), np.uint8)
    except (RuntimeError, ValueError) as error:
        raise CorruptShard(f"{where}: cannot be decompressed ({error})") from None


def _checked(data: Bytes, where: str) -> Bytes:
    """The bytes before a trailing crc32c; raises CorruptShard if they do not match it."""
    if len(data) < CRC_BYTES:
        raise CorruptShard(f"{where}: expected a checksum, found {len(data)} bytes")
    payload = np.ascontiguousarray(data[:-CRC_BYTES])
    if google_crc32c.value(payload) != int(data[-CRC_BYTES:].copy().view("<u4")[0]):
        raise CorruptShard(f"{where}: the bytes do not match their crc32c")
    return payload


def _shard_file(array: str, shard: int, axes: int) -> str:
    return "/".join([FOLDER, array, "c", str(shard), *("0" * axes)])


def _create_arrays(files: dict[str, Buffer], layout: Layout) -> dict[str, Any]:
    """Create Zarr arrays, by name, that store to `files`; it then holds their `zarr.json`."""
    group = zarr.create_group(
        MemoryStore(files),
        zarr_format=3,
        attributes={"datamerge": "row = shard * groups_per_shard + index; rows with count 0 hold no group"},
    )
    rows, per_shard = layout.groups, layout.groups_per_shard
    arrays: dict[str, Any] = {}
    for spec in layout.arrays:
        dtype = np.dtype(spec.dtype)
        arrays[spec.name] = group.create_array(
            name=spec.name,
            shape=(rows, *spec.shape),
            dtype=dtype,
            chunks=(1, *spec.shape),
            shards=(per_shard, *spec.shape),
            fill_value=np.nan if dtype.kind == "f" else int(np.iinfo(dtype).max),
            dimension_names=_axes(spec),
            compressors=[
                BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=dtype.itemsize),
                Crc32cCodec(),
            ],
            config={"write_empty_chunks": True},
        )
    for name, fill in (("count", 0), ("label", UNLABELLED)):
        arrays[name] = group.create_array(
            name=name,
            shape=(rows,),
            dtype=np.dtype(np.int64),
            chunks=(per_shard,),
            fill_value=fill,
            dimension_names=("group",),
            compressors=[Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
    return arrays


def _axes(spec: ArraySpec) -> tuple[str, ...]:
    """Names of an array's axes, generated for an array that the format does not define."""
    known = AXES.get(spec.name, ("group", *PIXELS))
    if len(known) == 1 + len(spec.shape):
        return known
    return ("group", *(f"{spec.name}_{axis}" for axis in range(len(spec.shape))))


def _contents(files: dict[str, Buffer]) -> dict[str, bytes]:
    """Files of the Zarr store by path in the artifact, sorted."""
    return {f"{FOLDER}/{path}": data.to_bytes() for path, data in sorted(files.items())}
