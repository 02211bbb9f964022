"""What a manifest names by its hash: the sidecars of its shards, and files that belong to no shard."""

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
# Records whose sidecars are kept by those that leave facts out, at about 110 bytes.
PACKED_RECORDS = 2**20
REQUESTS = 16  # sidecars that are requested at a time


class Sidecars:
    """The sidecars of an artifact, by position in the manifest's list: read, checked, and the last ones kept."""

    def __init__(self, location: Location, manifest: Manifest, *, all: bool = False) -> None:
        """Make one that has read nothing.

        Args:
            location: of the artifact.
            manifest: its own.
            all: keep what readers need of all of them.
        """
        self._location, self._manifest, self._keeps_all = location, manifest, all
        packed = PACKED_RECORDS // manifest.layout.groups_per_shard
        self._most = max(CACHED_COMMITS, len(manifest.shards) if all else packed)
        self._commits = Once[int, Commit](CACHED_COMMITS)
        self._packed = Once[int, PackedCommit](self._most)

    def commit(self, position: int) -> Commit:
        """The whole sidecar of a shard; raises as `read_committed` and `parse` do."""
        return self._commits.get(position, lambda: self._read(position))

    def commits(self) -> Iterator[Commit]:
        """Those of all shards, in order; of a remote artifact several are requested at a time."""
        positions = range(len(self._manifest.shards))
        if self._location.is_local:
            yield from map(self._passed, positions)
            return
        with in_threads(REQUESTS, self._passed, positions) as found:
            yield from found

    def kept(self, facts: bool) -> int:
        """How many are kept for readers, with `samples` and `info` of records or without."""
        return self._most if self._keeps_all or not facts else CACHED_COMMITS

    def of(self, position: int, facts: bool) -> Sidecar:
        """What a reader needs of the sidecar of a shard, with `samples` and `info` of records or without."""
        if facts and not self._keeps_all:
            return self.commit(position)
        return self._packed.get(position, lambda: self._pack(self._read(position)))

    def several(self, positions: Collection[int], facts: bool) -> dict[int, Sidecar]:
        """The same of some shards; those that are missing are requested together."""
        known = self._commits if facts and not self._keeps_all else self._packed
        missing = [position for position in positions if position not in known]
        found: dict[int, Sidecar] = {}
        if missing:
            with in_threads(REQUESTS, self.of, missing, repeat(facts)) as requested:
                found = dict(zip(missing, requested, strict=True))
        return {position: found.get(position) or self.of(position, facts) for position in positions}

    def _passed(self, position: int) -> Commit:
        """A whole sidecar, of which readers find what they need if all are kept."""
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
        # Counts and labels live here: a damaged sidecar would give wrong means from intact arrays.
        commit = parse(Commit, read_committed(self._location, path, entry.commit_sha256), where)
        if len(commit.records) != entry.groups or commit.plan_sha256 != self._manifest.plan_sha256:
            raise CorruptShard(f"{where}: the sidecar does not belong to this manifest")
        return commit


def read_committed(location: Location, path: str, sha256: str) -> bytes:
    """A file that the manifest names.

    Raises:
        CorruptShard: it is missing, or has another hash.
    """
    where = f"{location.url}/{path}"
    try:
        data = location.read(path)
        if hashlib.sha256(data).hexdigest() != sha256 and location.forget([path]):
            data = location.read(path)
    except FileNotFoundError:
        raise CorruptShard(f"{where}: the manifest lists this file, it is missing") from None
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise CorruptShard(
            f"{where}: expected sha256 {sha256[:12]}…, found {found[:12]}…; the file is damaged or was replaced"
        )
    return data
