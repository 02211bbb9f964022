"""Files that the manifest identifies by their hash: the sidecars of its shards, and files that belong to no shard."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from itertools import repeat

from storage_schemas.access.location import Location
from storage_schemas.access.once import Once
from storage_schemas.access.threads import in_threads
from storage_schemas.errors import CorruptShard
from storage_schemas.schema.manifest import Commit, Manifest, commit_path, parse
from storage_schemas.schema.packed import PackedCommit, Sidecar

CACHED_COMMITS = 64
# Records whose packed entries are kept where facts are left out, at about 110 bytes each.
PACKED_RECORDS = 2**20
REQUESTS = 16  # sidecars requested at a time


class Sidecars:
    """Reads, checks and caches the sidecars of an artifact, by position in the manifest's list."""

    def __init__(self, location: Location, manifest: Manifest, *, all: bool = False) -> None:
        """Create one with an empty cache.

        Args:
            location: of the artifact.
            manifest: of the artifact.
            all: keep all sidecars, in packed form.
        """
        self._location, self._manifest, self._keeps_all = location, manifest, all
        packed = PACKED_RECORDS // manifest.layout.groups_per_shard
        self._most = max(CACHED_COMMITS, len(manifest.shards) if all else packed)
        self._commits = Once[int, Commit](CACHED_COMMITS)
        self._packed = Once[int, PackedCommit](self._most)

    def commit(self, position: int) -> Commit:
        """The complete sidecar of a shard; raises the errors of `read_committed` and `parse`."""
        return self._commits.get(position, lambda: self._read(position))

    def commits(self) -> Iterator[Commit]:
        """The sidecars of all shards, in order; a remote artifact's are requested several at a time."""
        positions = range(len(self._manifest.shards))
        if self._location.is_local:
            yield from map(self._read_and_keep, positions)
            return
        with in_threads(REQUESTS, self._read_and_keep, positions) as found:
            yield from found

    def kept(self, facts: bool) -> int:
        """Number of sidecars that `of` keeps, with (`facts`) or without `samples` and `info` of records."""
        return self._most if self._keeps_all or not facts else CACHED_COMMITS

    def of(self, position: int, facts: bool) -> Sidecar:
        """The sidecar of a shard for reading records, with (`facts`) or without their `samples` and `info`."""
        if facts and not self._keeps_all:
            return self.commit(position)
        return self._packed.get(position, lambda: self._pack(self._read(position)))

    def several(self, positions: Collection[int], facts: bool) -> dict[int, Sidecar]:
        """`of` for several shards; missing sidecars are requested together."""
        known = self._commits if facts and not self._keeps_all else self._packed
        missing = [position for position in positions if position not in known]
        found: dict[int, Sidecar] = {}
        if missing:
            with in_threads(REQUESTS, self.of, missing, repeat(facts)) as requested:
                found = dict(zip(missing, requested, strict=True))
        return {position: found.get(position) or self.of(position, facts) for position in positions}

    def _read_and_keep(self, position: int) -> Commit:
        """The complete sidecar of a shard, whose packed form is kept if all are kept."""
        commit = self._read(position)
        if self._keeps_all:
            self._packed.get(position, lambda: self._pack(commit))
        return commit

    def _pack(self, commit: Commit) -> PackedCommit:
        return PackedCommit(commit, facts=self._keeps_all)

    def _read(self, position: int) -> Commit:
        entry = self._manifest.shards[position]
        path = commit_path(entry.shard)
        where = f"{self._location.url}/{path}"
        # Checked, because sidecars hold counts and labels: a damaged one would give wrong means from intact arrays.
        commit = parse(Commit, read_committed(self._location, path, entry.commit_sha256), where)
        if len(commit.records) != entry.groups or commit.plan_sha256 != self._manifest.plan_sha256:
            raise CorruptShard(f"{where}: the sidecar does not belong to the manifest; see `datamerge verify`")
        return commit


def read_committed(location: Location, path: str, sha256: str) -> bytes:
    """Contents of a file that the manifest lists with this sha256.

    Raises:
        CorruptShard: the file is missing or has another hash.
    """
    where = f"{location.url}/{path}"
    try:
        data = location.read(path)
        if hashlib.sha256(data).hexdigest() != sha256 and location.forget([path]):
            data = location.read(path)
    except (FileNotFoundError, IsADirectoryError):
        raise CorruptShard(f"{where}: the manifest lists this file, it is missing") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptShard(
            f"{where}: expected sha256 {sha256[:12]}…, found {found[:12]}…; the file is damaged or was replaced"
        )
    return data
