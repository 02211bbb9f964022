"""Byte ranges of an artifact's files: from memory maps where they are local, else from the location's fetcher."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from storage_schemas.access.block_file import BlockFile, Bytes
from storage_schemas.access.devices import refuse_devices
from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.access.fetching import Fetcher
from storage_schemas.access.location import Location
from storage_schemas.access.lru import Lru
from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import FileEntry

# At a time; more would hold more descriptors, of which many systems allow 1,024.
OPEN_MAPS = 32
BLOCK = 16 * 2**20


def damage(location: Location, entry: FileEntry) -> str | None:
    """How a file differs from its committed size and hash; None if it does not. Reads it in blocks of 16 MiB."""
    try:
        size = location.size(entry.path)
        if size != entry.bytes:
            return f"expected {entry.bytes} bytes, found {size}"
        digest = hashlib.sha256()
        for start in range(0, size, BLOCK):
            digest.update(location.read(entry.path, start, min(start + BLOCK, size)))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return "the file is missing"
    if digest.hexdigest() != entry.sha256:
        return f"expected sha256 {entry.sha256[:12]}…, found {digest.hexdigest()[:12]}…"
    return None


def check_files(location: Location, entries: Iterable[FileEntry]) -> None:
    """Compare files with their committed sizes and hashes.

    Raises:
        CorruptShard: one differs.
    """
    for entry in entries:
        found = damage(location, entry)
        if found is not None:
            raise CorruptShard(f"{location.url}/{entry.path}: {found}; run `datamerge verify` to see the rest")


class FileRanges:
    """Reads ranges of many files, keeping the last `OPEN_MAPS` memory maps open."""

    def __init__(self, location: Location) -> None:
        self._location, self._is_local = location, location.is_local
        self._maps = Lru[str, Bytes](OPEN_MAPS)  # of local files
        self._copies = Lru[str, BlockFile](OPEN_MAPS)  # of remote files
        self._fetcher: Fetcher | None = None

    def read(self, path: str, start: int, size: int, file_bytes: int | None = None) -> Bytes:
        """`size` bytes from `start`; a view of the map for local files and for copies in the local cache.

        Args:
            path: of the file in the location.
            start: position of the first byte.
            size: number of bytes.
            file_bytes: size of the whole file according to its sidecar; without it a cache asks the server, once per
                file.

        Raises:
            CorruptShard: the file is missing or too short.
        """
        try:
            if self._is_local:
                mapped = self._maps.get(path)
                data = (self._map(path) if mapped is None else mapped)[start : start + size]
            else:
                data = self._copied(path, start, start + size, file_bytes)
        except FileNotFoundError:
            raise CorruptShard(f"{self._location.url}/{path}: the file is missing") from None
        if len(data) != size:
            raise CorruptShard(
                f"{self._location.url}/{path}: expected {size} bytes at {start}, found {len(data)}; it is cut short"
            )
        return data

    def _copied(self, path: str, start: int, end: int, file_bytes: int | None) -> Bytes:
        copy = self._copies.get(path)
        if copy is not None and not copy.missing(start, end) and (self._is_quiet() or copy.is_complete):
            return copy.view[start:end]
        fetcher = fetcher_of(self._location)
        data = fetcher.read(path, start, end, file_bytes)
        if (copy := fetcher.settled(path)) is not None:
            self._copies.put(path, copy)
            self._fetcher = fetcher
        return data

    def _is_quiet(self) -> bool:
        return self._fetcher is not None and self._fetcher.is_quiet

    def _map(self, path: str) -> Bytes:
        local = self._location.path(path)
        refuse_devices(local)
        try:
            # Pages are shared among processes, read on use, and dropped under memory pressure.
            mapped = np.memmap(local, np.uint8, mode="r").view(np.ndarray)
        except ValueError:  # an empty file cannot be mapped
            raise CorruptShard(f"{self._location.url}/{path}: the file is empty") from None
        except IsADirectoryError:
            raise CorruptShard(f"{self._location.url}/{path}: expected a file, found a folder") from None
        self._maps.put(path, mapped)
        return mapped
