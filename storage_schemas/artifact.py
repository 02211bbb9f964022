"""Reading an artifact: by index, by key, in storage order; from a folder or any fsspec URL."""

from __future__ import annotations

import bisect
import copy
import hashlib
import operator
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, SupportsIndex

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from storage_schemas.access.cache import Cache, CachedLocation
from storage_schemas.access.location import Location
from storage_schemas.access.lru import Lru
from storage_schemas.access.ranges import damage
from storage_schemas.display import one_line, table
from storage_schemas.errors import CorruptShard, DatamergeError, NotAnArtifact, SchemaError, shortened
from storage_schemas.key_index import rows_of
from storage_schemas.schema.arguments import check_choice
from storage_schemas.schema.manifest import (
    HEAD,
    KEYS,
    MANIFEST,
    PREVIEW,
    ArraySpec,
    Commit,
    FileEntry,
    Manifest,
    commit_path,
    parse,
)
from storage_schemas.schema.plain_json import read_json
from storage_schemas.schema.record import Array, Record, crc32c
from storage_schemas.stores import Reader, store_of

CACHED_COMMITS = 64
LARGEST_SHEET = 8 * 2**20  # bytes of a contact sheet that a notebook is given

Verify = Literal["off", "record", "shard"]


def open_artifact(
    url: str | os.PathLike[str] | Location,
    *,
    partial: bool = False,
    verify: Verify = "record",
    cache: Cache | None = None,
) -> Artifact:
    """Open an artifact for reading.

    Args:
        url: a folder or fsspec URL, or a `Location` where the driver needs options.
        partial: accept an artifact whose merge has not finished; its committed shards are served.
        verify: what is compared with the committed checksums when a record is read: its arrays (`record`), all
            files of its shard once, when the first of its records is read (`shard`), or nothing (`off`).
            Sidecars are always checked.
        cache: where to keep copies of the files of a remote artifact; without it single records are requested.

    Raises:
        ConfigError: another value of `verify`.
        NotAnArtifact: no manifest there, or an unfinished merge without `partial`.
        SchemaError: a manifest that does not follow the format.
        CorruptShard: a manifest that is not as it was written.
    """
    check_choice("verify", verify, Verify)
    location = url if isinstance(url, Location) else Location(url)
    if cache is not None:
        location = CachedLocation.of(location, cache)
    return Artifact(location, partial=partial, verify=verify)


class Artifact:
    """A sequence of `Record`s. Index i counts committed groups in storage order; a key works as an index too.

    The arrays of a record are read-only: those of a local tar file are views of it.
    Instances can be pickled and sent to workers; open files are not shared.
    """

    def __init__(self, location: Location, *, partial: bool, verify: Verify) -> None:
        self.location = location
        self._verify = verify
        self._checked_shards: set[int] = set()
        try:
            data = location.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise NotAnArtifact(f"{location.url}: expected an artifact, found no {MANIFEST} there") from None
        self.manifest = parse(Manifest, data, f"{location.url}/{MANIFEST}")
        if not self.manifest.complete and not partial:
            raise NotAnArtifact(
                f"{location.url}: the merge is not finished ({len(self.manifest.shards)} of "
                f"{self.manifest.layout.shards} shards in the manifest); run the command that made it again"
            )
        self.shard_sizes: list[int] = list(self.manifest.shards.column("groups"))
        self._index_is_sound = False
        self._specs = self.manifest.layout.arrays
        self._starts = [0, *np.cumsum(self.shard_sizes, dtype=np.int64).tolist()]
        self._reset()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int | str) -> Record:
        """The record with this index or key; negative indices count from the end.

        Raises:
            IndexError, KeyError: no such record.
            TypeError: neither an index nor a key, such as a slice.
            CorruptShard: its bytes are not the committed ones.
        """
        if isinstance(index, str):
            return self.read(*self._find(index))
        if not isinstance(index, SupportsIndex):
            raise TypeError(f"{self.location.url}: expected an index or a key, found {shortened(index)}")
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.location.url}: record {index} of {len(self)}")
        index %= len(self)
        position = bisect.bisect_right(self._starts, index) - 1
        return self.read(position, index - self._starts[position])

    def __iter__(self) -> Iterator[Record]:
        for position, size in enumerate(self.shard_sizes):
            for offset in range(size):
                yield self.read(position, offset)

    def read(self, position: int, offset: int) -> Record:
        """Record `offset` of the shard at `position` in the manifest's list."""
        try:
            return self._read(position, offset)
        except CorruptShard:
            if not self._forget_copies(position):
                raise
        return self._read(position, offset)

    def _read(self, position: int, offset: int) -> Record:
        commit = self.commit(position)
        if self._verify == "shard" and position not in self._checked_shards:
            self._check_files(commit)
            self._checked_shards.add(position)
        entry = commit.records[offset]
        try:
            arrays = read_arrays(self._reader, commit, offset, self._specs, check=self._verify == "record")
        except CorruptShard as error:
            raise CorruptShard(f"{self.location.url}: {error}; see `datamerge verify`") from None
        return Record(
            key=entry.key,
            count=entry.count,
            encoding=self.manifest.layout.encoding,
            arrays=arrays,
            label=entry.label,
            samples=entry.samples,
            info=entry.info,
        )

    def _forget_copies(self, position: int) -> bool:
        """Drop the shard's copies from the local cache, once: only the cache may be to blame."""
        if position in self._fetched_again:
            return False
        self._fetched_again.add(position)
        dropped = self.location.forget(file.path for file in self.commit(position).files)
        if dropped:
            self._reader = store_of(self.manifest.layout).reader(self.location)
        return dropped

    def only(self, names: Collection[str]) -> Artifact:
        """The same artifact, reading these arrays alone; a record then lacks what the others would give."""
        selected = copy.copy(self)
        selected._specs = tuple(spec for spec in self.manifest.layout.arrays if spec.name in names)
        return selected

    def commit(self, position: int) -> Commit:
        """Sidecar of the shard at `position` in the manifest's list."""
        cached = self._commits.get(position)
        if cached is not None:
            return cached
        entry = self.manifest.shards[position]
        path = commit_path(entry.shard)
        where = f"{self.location.url}/{path}"
        # Counts and labels live here: a damaged sidecar would give wrong means from intact arrays.
        commit = parse(Commit, self._read_committed(path, entry.commit_sha256), where)
        if len(commit.records) != entry.groups or commit.plan_sha256 != self.manifest.plan_sha256:
            raise CorruptShard(f"{where}: the sidecar does not belong to this manifest")
        self._commits.put(position, commit)
        return commit

    def index_of(self, key: str) -> int:
        """Index of the record with this key; reads a sidecar, and a small range of the index of keys if there is one.

        Raises:
            KeyError: no such key.
            CorruptShard: the index of keys is not as it was committed.
        """
        position, offset = self._find(key)
        return int(self._starts[position]) + offset

    def _find(self, key: str) -> tuple[int, int]:
        index = self._listed(KEYS)
        if index is not None:
            return self._find_in(index, key)
        for position, span in enumerate(self.manifest.shards.column("key_range")):
            if span is None or not span[0] <= key <= span[1]:
                continue
            for offset, record in enumerate(self.commit(position).records):
                if record.key == key:
                    return position, offset
        raise KeyError(f"{self.location.url}: no record with key {key!r}")

    def _find_in(self, index: FileEntry, key: str) -> tuple[int, int]:
        """By the index of keys; its bytes are compared with their hash before a key is said not to be there."""
        numbers = self.manifest.shards.column("shard")
        for row in rows_of(self.location, index, key):
            shard, offset = divmod(row, self.manifest.layout.groups_per_shard)
            position = bisect.bisect_left(numbers, shard)
            if position < len(numbers) and numbers[position] == shard:
                records = self.commit(position).records
                if offset < len(records) and records[offset].key == key:
                    return position, offset
        if not self._index_is_sound:
            self._read_committed(KEYS, index.sha256)
            self._index_is_sound = True
        raise KeyError(f"{self.location.url}: no record with key {key!r}")

    def _check_files(self, commit: Commit) -> None:
        for file in commit.files:
            found = damage(self.location, file)
            if found is not None:
                raise CorruptShard(
                    f"{self.location.url}/{file.path}: {found}; run `datamerge verify` to see the rest"
                )

    def head(self) -> tuple[dict[str, Array], list[str]] | None:
        """The class head's tensors (see `parse_head`) and class names, if the artifact has one.

        Raises:
            SchemaError: the file is not a head.
            CorruptShard: its bytes are not the committed ones.
        """
        entry = self._listed(HEAD)
        if entry is None:
            return None
        return parse_head(self._read_committed(HEAD, entry.sha256), f"{self.location.url}/{HEAD}")

    def _listed(self, path: str) -> FileEntry | None:
        """What the manifest says of a file that belongs to no shard."""
        return next((file for file in self.manifest.files if file.path == path), None)

    def _read_committed(self, path: str, sha256: str) -> bytes:
        """A file that the manifest names; raises CorruptShard unless it is there and has this hash."""
        where = f"{self.location.url}/{path}"
        try:
            data = self.location.read(path)
            if hashlib.sha256(data).hexdigest() != sha256 and self.location.forget([path]):
                data = self.location.read(path)
        except FileNotFoundError:
            raise CorruptShard(f"{where}: the manifest lists this file, it is missing") from None
        found = hashlib.sha256(data).hexdigest()
        if found != sha256:
            raise CorruptShard(
                f"{where}: expected sha256 {sha256[:12]}…, found {found[:12]}…; the file is damaged or was replaced"
            )
        return data

    def _reset(self) -> None:
        self._commits = Lru[int, Commit](CACHED_COMMITS)
        self._fetched_again: set[int] = set()
        self._reader = store_of(self.manifest.layout).reader(self.location)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_commits", "_reader")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __repr__(self) -> str:
        return one_line(self, self.location.url, *self.manifest.outline)

    def _repr_html_(self) -> str:
        """What a notebook shows: facts, and the contact sheet where the artifact has a sound one."""
        layout = self.manifest.layout
        facts: dict[str, object] = {
            "groups": f"{len(self)}, in {len(self.shard_sizes)} of {layout.shards} shards",
            "bytes": f"{self.manifest.bytes:,}",
            "format": f"{layout.format}, {layout.encoding}",
            **{spec.name: f"{spec.dtype} {list(spec.shape)}" for spec in layout.arrays},
        }
        sheet, entry = b"", self._listed(PREVIEW)
        if entry is not None and entry.bytes <= LARGEST_SHEET:
            with suppress(DatamergeError, OSError):  # the facts are worth showing all the same
                sheet = self._read_committed(PREVIEW, entry.sha256)
        return table(self.location.url, facts, sheet)


def read_arrays(
    reader: Reader, commit: Commit, index: int, specs: Sequence[ArraySpec], check: bool
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


def parse_head(data: bytes, where: str) -> tuple[dict[str, Array], list[str]]:
    """Read a class head in safetensors form.

    Tensors: `weight` [classes, K], optionally `bias` [classes], optionally `scale` [1] (embeddings are then
    normalised to length 1 and logits multiplied by it). Class names: JSON list in the metadata entry `names`.

    Raises:
        SchemaError: not safetensors, no two-dimensional `weight`, other shapes, or numbers that are not finite.
    """
    try:
        tensors: dict[str, Array] = load_safetensors(data)
    except SafetensorError as error:
        raise SchemaError(f"{where}: expected a safetensors file with `weight`, found {error}") from None
    except KeyError as error:
        raise SchemaError(f"{where}: expected tensors of dtypes that NumPy has, such as F32, found {error}") from None
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2 or not set(tensors) <= {"weight", "bias", "scale"}:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise SchemaError(f"{where}: expected weight [classes, K] and optional bias and scale, found {shapes}")
    _check_head(tensors, where)
    header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])  # sound, or safetensors had refused it
    try:
        names = read_json(header.get("__metadata__", {}).get("names", "[]"))
    except ValueError as error:
        raise SchemaError(f"{where}: expected a JSON list of class names, found {error}") from None
    if not isinstance(names, list):
        raise SchemaError(f"{where}: expected a JSON list of class names, found {type(names).__name__}")
    if names and len(names) != len(weight):
        raise SchemaError(f"{where}: expected the names of {len(weight)} classes, found {len(names)}")
    return tensors, [str(name) for name in names]


def _check_head(tensors: Mapping[str, Array], where: str) -> None:
    """Raise SchemaError for a bias or a scale that no logits come of, or that turns them round."""
    weight = tensors["weight"]
    for name, size in (("bias", len(weight)), ("scale", 1)):
        if name in tensors and (tensors[name].ndim > 1 or tensors[name].size != size):
            raise SchemaError(
                f"{where}: expected {name} [{size}] beside weight {list(weight.shape)}, found "
                f"{list(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise SchemaError(f"{where}: expected finite numbers, found others in {name}")
    if "scale" in tensors and not tensors["scale"].item() > 0:
        raise SchemaError(f"{where}: expected a scale above 0, found {tensors['scale'].item():g}")
