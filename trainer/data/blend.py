"""Several artifacts as one sequence of records."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Iterable, Sequence

from storage_schemas import Artifact, Record
from storage_schemas.stores.arrays import Rows


class Blend:
    """Artifacts end to end: the groups of the first, then those of the second, and so on. Nothing is copied.

    With several artifacts, record keys get the artifact's URL as a suffix, since keys may repeat between artifacts.

    Args:
        artifacts: one or more.
    """

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self.artifacts = tuple(artifacts)
        self._ends: list[int] = []
        for artifact in self.artifacts:
            self._ends.append(len(self) + len(artifact))

    @classmethod
    def of(cls, groups: Artifact | Blend) -> Blend:
        """The same groups as a blend."""
        return groups if isinstance(groups, Blend) else cls([groups])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Record:
        """The record at an index ≥ 0; raises as `Artifact` does."""
        return self.read(index)

    def read(self, index: int, rows: Rows | None = None) -> Record:
        """The record at an index, optionally with only some rows of its arrays; see `Artifact.part`."""
        number, own = self.locate(index)
        record = self.artifacts[number].part(own, rows)
        if len(self.artifacts) == 1:
            return record
        return dataclasses.replace(record, key=f"{record.key} of {self.artifacts[number].location.url}")

    @property
    def shard_sizes(self) -> list[int]:
        """Groups of each shard, in the order of indices."""
        return [size for artifact in self.artifacts for size in artifact.shard_sizes]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of the artifact that contains a group, and the group's index in it."""
        number = bisect.bisect_right(self._ends, index)
        if number == len(self._ends):
            raise IndexError(f"record {index} of {len(self)}")
        return number, index - (self._ends[number - 1] if number else 0)

    def where(self, index: int) -> str:
        """Name of a group in messages: URL of its artifact, and its index there."""
        number, own = self.locate(index)
        return f"{self.artifacts[number].location.url}: group {own}"

    def only(self, names: Collection[str], *, facts: bool = True) -> Blend:
        """The same groups, reading these arrays alone; see `Artifact.only`."""
        return Blend([artifact.only(names, facts=facts) for artifact in self.artifacts])

    def apart(self) -> Blend:
        """The same groups with their own prefetching; see `Artifact.apart`."""
        return Blend([artifact if artifact.location.is_local else artifact.apart() for artifact in self.artifacts])

    @property
    def is_local(self) -> bool:
        """Whether all of them are on this machine."""
        return all(artifact.location.is_local for artifact in self.artifacts)

    def expect(self, indices: Iterable[int]) -> int:
        """Prefetch groups, for each artifact in the given order; see `Artifact.expect`. Returns their bytes."""
        return sum(artifact.expect(own) for artifact, own in self._located(indices))

    def fill(self, indices: Iterable[int]) -> None:
        """Fetch groups into the cache, after all prefetches; see `Artifact.fill`."""
        for artifact, own in self._located(indices):
            artifact.fill(own)

    @property
    def is_filled(self) -> bool:
        """Whether all that `fill` has announced is in the cache."""
        return all(artifact.is_filled for artifact in self.artifacts)

    def expect_nothing(self) -> None:
        """Cancel prefetches that were not read yet."""
        for artifact in self.artifacts:
            artifact.expect_nothing()

    @property
    def cache_bytes(self) -> int:
        """Capacity in bytes of the cache, which the remote artifacts share; 0 without a cache."""
        return max(artifact.cache_bytes for artifact in self.artifacts)

    @property
    def bytes_read(self) -> int:
        """Approximate size in remote files of the arrays that are read."""
        return sum(artifact.bytes_read for artifact in self.artifacts if not artifact.location.is_local)

    def _located(self, indices: Iterable[int]) -> list[tuple[Artifact, list[int]]]:
        """Split indices by artifact, keeping their order; artifacts without any are left out."""
        found: list[list[int]] = [[] for _ in self.artifacts]
        for number, own in map(self.locate, indices):
            found[number].append(own)
        return [(artifact, own) for artifact, own in zip(self.artifacts, found, strict=True) if own]
