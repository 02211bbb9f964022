"""Commit protocol: first the files of a shard, each written atomically, then its sidecar, last the manifest.

A shard exists once `commits/NNNNN.json` does. A process that is killed between two steps leaves at most files that no
sidecar lists; the next run overwrites them with the same bytes. For the same reason two writers of one plan may work
on an artifact at once: each file is replaced atomically by a file with the same bytes.

Equal plans may give different bytes, as on GPUs that add in any order. Then the second of two writers to commit a
shard writes all of its files again before its sidecar, so that no file of the first is left among them. Two commits
within the time of one small write may still leave a mixture, which `verify` detects and the next merge repairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from storage_schemas.access.location import Location
from storage_schemas.access.redaction import redact, redact_tree
from storage_schemas.access.threads import in_threads
from storage_schemas.errors import CorruptShard, NotAnArtifact, SchemaError
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    UNSEALED,
    Commit,
    FileEntry,
    Layout,
    Manifest,
    Ranges,
    RecordEntry,
    Reject,
    ShardEntry,
    commit_path,
    dump,
    parse,
    shard_of_sidecar,
)
from storage_schemas.schema.provenance import changes, own_version, plan_sha256, without_locations
from storage_schemas.schema.record import Record, checksums
from storage_schemas.stores import store_of

# Reading a small file from remote storage takes one round trip, so several are read at a time.
SIDECARS_AT_ONCE = 8


class ArtifactWriter:
    """Writes one artifact. Cheap to pickle: every worker holds a copy and commits its own shards.

    Args:
        location: where to write the artifact.
        layout: format, encoding, arrays and number of groups.
        provenance: JSON object with the settings and inputs of the merge; secrets in URLs are masked.
    """

    def __init__(self, location: Location, layout: Layout, provenance: Mapping[str, Any]) -> None:
        self.location = location
        self.layout = layout
        # Artifacts may be published: mask passwords and signatures in the URLs of sources and weights.
        self.provenance: dict[str, Any] = redact_tree(provenance)
        self.plan = plan_sha256(layout, self.provenance)

    def begin(self, files: Mapping[str, bytes]) -> None:
        """Claim the location: write `files` and a manifest that says `complete: false`.

        If the location holds an artifact of the same plan, only those of `files` are written that its manifest does
        not list, for example after `verify.fix`. If only the manifest is missing, it is rebuilt from the sidecars.

        Args:
            files: contents by path of files that belong to no shard.

        Raises:
            NotAnArtifact: the location holds another artifact (the message shows the differences) or other files.
        """
        contents = {**files, **store_of(self.layout).metadata_files()}
        if not self._has_same_plan():
            # An earlier begin() that was killed before it wrote the manifest leaves exactly these files.
            own = {path.partition("/")[0] for path in contents}
            foreign = [name for name in self.location.names() if not name.startswith(".") and name not in own]
            foreign += [path for path, data in contents.items() if not self._absent_or_equal(path, data)]
            # Check again: a second writer may have started in the meantime.
            if foreign and not self._has_same_plan():
                raise NotAnArtifact(
                    f"{self.location.url}: expected a new folder or an artifact, found {foreign[0]!r} and no "
                    f"{MANIFEST}; choose another output"
                )
        old = self._old_manifest()
        listed = {entry.path for entry in old.files} if old else set()
        if not contents.keys() <= listed or old is None:
            self.finish({path: data for path, data in contents.items() if path not in listed})

    def committed(self) -> set[int]:
        """Numbers of the shards that are committed."""
        numbers = (shard_of_sidecar(f"commits/{name}") for name in self.location.names("commits"))
        return {number for number in numbers if number is not None}

    def commit(self, shard: int, records: Iterable[Record], rejects: Sequence[Reject]) -> Commit:
        """Write the shard's files, then its sidecar. A shard that is already committed is not written.

        Args:
            shard: number of the shard.
            records: in order. Each is copied before the next one is taken from the iterator.
            rejects: samples that could not be used.

        Returns:
            The sidecar of the shard.

        Raises:
            ValueError: the arrays of a record do not follow the layout or are not finite, a key occurs twice, or
                there are more records than a shard holds. Nothing is written then.
        """
        committed = self._committed(shard)
        if committed is not None:
            return committed
        encoder, spread = store_of(self.layout).encoder(shard), _Spread()
        entries: dict[str, RecordEntry] = {}
        for record in records:
            _check_record(record, self.layout)
            if record.key in entries or len(entries) == self.layout.groups_per_shard:
                limit = f"{self.layout.groups_per_shard} distinct keys at most"
                raise ValueError(f"shard {shard}: expected {limit}, found {record.key} after {len(entries)}")
            # The name of a sample may be a URL, or a command that contains one.
            record = replace(record, samples=tuple(map(redact, record.samples)))
            entries[record.key] = _record_entry(record, self.layout, encoder.add(record))
            spread.add(record)
        # Kept until the sidecar is written: compressed, they take less memory than the rows that were freed.
        contents = []
        for path, data in encoder.files():
            self.location.write(path, data)
            contents.append((path, data))
        commit = Commit(
            schema_version=SCHEMA_VERSION,
            shard=shard,
            plan_sha256=self.plan,
            files=tuple(sorted((_entry(path, data) for path, data in contents), key=lambda entry: entry.path)),
            records=tuple(entries.values()),
            rejects=tuple(
                reject.model_copy(update={"reason": redact(reject.reason), "sample": redact(reject.sample)})
                for reject in rejects
            ),
            ranges=spread.ranges(),
            self_sha256=UNSEALED,
        )
        other = self._committed(shard)
        if other is not None and other.files != commit.files:
            for path, data in contents:
                self.location.write(path, data)
        self.location.write(commit_path(shard), dump(commit))
        return commit

    def finish(
        self,
        extra: Mapping[str, bytes] | None = None,
        on_sidecar: Callable[[FileEntry, Commit], None] = lambda sidecar, commit: None,
    ) -> Manifest:
        """Rebuild the manifest from the existing sidecars; it is `complete` when every planned shard has one.

        Args:
            extra: contents by path of more files to write.
            on_sidecar: called with the file entry and the document of every sidecar, in the order of the shards. Each
                sidecar is read once.

        Raises:
            SchemaError, CorruptShard: a sidecar is damaged or has another plan.
        """
        shards = Columns(ShardEntry, self._entries(on_sidecar))
        old = self._old_manifest()
        manifest = self.add_files(self._manifest(shards, old.files if old else ()), extra or {})
        if manifest.complete:
            self.location.remove_leftovers()
        return manifest

    def add_files(self, manifest: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Write more files of the artifact, such as its card, then `manifest` with their entries.

        Files that are already there are not written again: a finished artifact may be on read-only storage.
        """
        for path, data in files.items():
            self._put(path, data)
        listed = {entry.path: entry for entry in manifest.files}
        listed |= {path: _entry(path, data) for path, data in files.items()}
        manifest = self._manifest(manifest.shards, tuple(listed[path] for path in sorted(listed)))
        old = self._old_manifest()
        # An equal manifest by another release is kept: `writer` names the release that last changed the artifact.
        if old is not None and old == manifest.model_copy(
            update={"writer": old.writer, "self_sha256": old.self_sha256}
        ):
            return old
        self.location.write(MANIFEST, dump(manifest))
        return manifest

    def _put(self, path: str, data: bytes) -> None:
        if not self.location.exists(path) or self.location.read(path) != data:
            self.location.write(path, data)

    def _has_same_plan(self) -> bool:
        """Whether the location holds an artifact of this plan, with or without a manifest.

        Raises:
            NotAnArtifact: it holds a manifest of another plan.
        """
        old = self._old_manifest()
        if old is not None:
            self._check_same_plan(old)
            return True
        return any(self._committed(shard) is not None for shard in sorted(self.committed()))

    def _old_manifest(self) -> Manifest | None:
        try:
            data = self.location.read(MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return parse(Manifest, data, f"{self.location.url}/{MANIFEST}")

    def _committed(self, shard: int) -> Commit | None:
        """The sidecar of a shard; None if it is missing, damaged or of another plan."""
        try:
            commit = parse(Commit, self.location.read(commit_path(shard)), commit_path(shard))
        except (FileNotFoundError, NotADirectoryError, SchemaError, CorruptShard):
            return None
        return commit if (commit.shard, commit.plan_sha256) == (shard, self.plan) else None

    def _entries(self, on_sidecar: Callable[[FileEntry, Commit], None]) -> Iterator[ShardEntry]:
        shards = sorted(self.committed())
        # Only reads are threaded: parsing in the threads as well takes 2.5 times the CPU time (contention).
        with in_threads(SIDECARS_AT_ONCE, self.location.read, map(commit_path, shards)) as contents:
            for shard, data in zip(shards, contents, strict=True):
                sidecar, commit = self._sidecar(shard, data)
                on_sidecar(sidecar, commit)
                yield ShardEntry.of(commit, sidecar.sha256)

    def _sidecar(self, shard: int, data: bytes) -> tuple[FileEntry, Commit]:
        path = commit_path(shard)
        where = f"{self.location.url}/{path}"
        commit = parse(Commit, data, where)
        if commit.shard != shard or shard >= self.layout.shards or commit.plan_sha256 != self.plan:
            raise CorruptShard(
                f"{where}: expected the sidecar of shard {shard} of this artifact, found one of shard {commit.shard} "
                f"of plan {commit.plan_sha256[:12]}…; run `datamerge verify` with `fix=True`"
            )
        return _entry(path, data), commit

    def _absent_or_equal(self, path: str, data: bytes) -> bool:
        return not self.location.exists(path) or self.location.read(path) == data

    def _manifest(self, shards: Columns[ShardEntry], files: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(
            schema_version=SCHEMA_VERSION,
            writer=f"datamerge {own_version()}",
            complete=len(shards) == self.layout.shards,
            layout=self.layout,
            plan_sha256=self.plan,
            provenance=self.provenance,
            files=files,
            shards=shards,
            self_sha256=UNSEALED,
        )

    def _check_same_plan(self, found: Manifest) -> None:
        if found.plan_sha256 == self.plan:
            return
        mine = {"layout": self.layout.model_dump(mode="json"), **without_locations(self.provenance)}
        theirs = {"layout": found.layout.model_dump(mode="json"), **without_locations(found.provenance)}
        raise NotAnArtifact(
            f"{self.location.url} already holds an artifact made from other settings "
            f"({'; '.join(changes(theirs, mine)[:4])}); choose another output, or remove it first"
        )


def _entry(path: str, data: bytes) -> FileEntry:
    return FileEntry(path=path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _check_record(record: Record, layout: Layout) -> None:
    for spec in layout.arrays:
        array = record.arrays.get(spec.name)
        if array is None or array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            found = "nothing" if array is None else f"{array.dtype} {array.shape}"
            raise ValueError(f"group {record.key}: expected {spec.name} {spec.dtype} {spec.shape}, found {found}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"group {record.key}: {spec.name} is not finite")


def _record_entry(record: Record, layout: Layout, offsets: dict[str, int] | None) -> RecordEntry:
    return RecordEntry(
        key=record.key,
        count=record.count,
        label=record.label,
        samples=record.samples,
        checksums=checksums(record.arrays, layout),
        offsets=offsets,
        info=dict(record.info),
    )


class _Spread:
    """Ranges of the moments of a shard, updated record by record: all decoded moments would take more memory."""

    def __init__(self) -> None:
        self._least_mean, self._largest_mean, self._largest_variance = inf, -inf, -inf
        self._variance_means: list[float] = []
        self._clipped = 0

    def add(self, record: Record) -> None:
        mean, variance = record.mean, record.variance
        self._least_mean = min(self._least_mean, float(mean.min()))
        self._largest_mean = max(self._largest_mean, float(mean.max()))
        self._largest_variance = max(self._largest_variance, float(variance.max()))
        self._variance_means.append(float(variance.mean(dtype=np.float64)))
        self._clipped += record.clipped_variances()

    def ranges(self) -> Ranges | None:
        """The ranges over all records; None if there were none."""
        if not self._variance_means:
            return None
        return Ranges(
            mean_min=self._least_mean,
            mean_max=self._largest_mean,
            variance_max=self._largest_variance,
            variance_mean=float(np.mean(self._variance_means)),
            clipped_variances=self._clipped,
        )
