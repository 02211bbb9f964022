"""`datamerge verify`: compare every file of an artifact with what was committed.

The chain of hashes starts in `manifest.json`, which holds its own sha256. It lists the sha256 of every sidecar and of
every file outside shards; each sidecar lists those of its shard's files. A damaged shard file is then read record by
record, to report which groups are lost.

`fix` removes the sidecars of damaged shards and their entries in the manifest. These shards then count as not
committed, and the same merge command writes them, and only them, again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from storage_schemas.access.location import Location
from storage_schemas.access.ranges import damage
from storage_schemas.access.threads import in_threads
from storage_schemas.display import one_line
from storage_schemas.errors import CorruptShard, NotAnArtifact, SchemaError, UnknownVersion, UserError
from storage_schemas.schema.columns import Columns
from storage_schemas.schema.manifest import (
    CARD,
    CROISSANT,
    HEAD,
    KEYS,
    MANIFEST,
    PREVIEW,
    Commit,
    Manifest,
    ShardEntry,
    commit_path,
    dump,
    parse,
    shard_of_sidecar,
)
from storage_schemas.schema.provenance import plan_sha256
from storage_schemas.stores import Store, store_of
from storage_schemas.stores.arrays import read_arrays

THREADS = 4
REQUESTS = 16  # at a time, to a remote artifact; each is for one block of a file, see `damage`


@dataclass(frozen=True, slots=True)
class Problem:
    """One difference from what was committed.

    Attributes:
        file: path in the artifact.
        cause: what was expected and found.
        shard: number of the shard that is damaged; None if none is.
        record: key of the record that cannot be read; None if the problem is the file as a whole.
        stray: whether the file does not belong to the artifact; `fix` does not touch it.
    """

    file: str
    cause: str
    shard: int | None = None
    record: str | None = None
    stray: bool = False

    def __str__(self) -> str:
        return f"{self.file}{f', record {self.record}' if self.record else ''}: {self.cause}"


@dataclass(slots=True)
class Report:
    """The result of `verify`.

    Attributes:
        url: of the artifact.
        complete: whether the manifest states that every planned shard is committed.
        shards, groups, bytes: how many were checked.
        problems: first of the manifest, then of files outside shards, of shards, and of unlisted files.
        removed: files that `fix` removed.
    """

    url: str
    complete: bool = False
    shards: int = 0
    groups: int = 0
    bytes: int = 0
    problems: list[Problem] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        found = f"{len(self.problems)} problem(s)" if self.problems else "sound"
        return one_line(self, self.url, found, f"{self.groups} groups in {self.shards} shards", f"{self.bytes} bytes")


@dataclass(frozen=True, slots=True)
class _ShardFindings:
    groups: int
    bytes: int
    files: set[str]
    problems: tuple[Problem, ...]


def verify(location: Location, on_shard: Callable[[int, int], None] = lambda done, total: None) -> Report:
    """Check every file of an artifact; each thread holds one block of a file in memory.

    Args:
        location: of the artifact.
        on_shard: called with the number of shards checked so far and their total.

    Raises:
        NotAnArtifact: there is neither a manifest nor a sidecar.
        UnknownVersion: the artifact has a newer format version.
    """
    report = Report(location.url)
    found_paths = _paths(location)
    sidecars = sorted(number for path in found_paths if (number := shard_of_sidecar(path)) is not None)
    manifest = _manifest(location, sidecars, report)
    named = {MANIFEST}
    entries: dict[int, ShardEntry | None] = dict.fromkeys(sidecars)
    if manifest is not None:
        report.complete = manifest.complete
        entries |= {entry.shard: entry for entry in manifest.shards}
        named |= {file.path for file in manifest.files}
        causes = ((file.path, damage(location, file)) for file in manifest.files)
        report.problems += [Problem(path, cause) for path, cause in causes if cause is not None]
    shards = sorted(entries)
    check = _ShardCheck(location, manifest)
    threads = THREADS if location.is_local else REQUESTS
    with in_threads(threads, check, shards, map(entries.get, shards)) as findings:
        for done, found in enumerate(findings, 1):
            report.groups += found.groups
            report.bytes += found.bytes
            report.problems += found.problems
            named |= found.files
            report.shards = done
            on_shard(done, len(shards))
    if manifest is not None:
        bad_shards = {problem.shard for problem in report.problems}
        report.problems += _unlisted_files(manifest, found_paths - named, bad_shards)
    return report


def fix(location: Location, report: Report) -> None:
    """Remove the sidecars of damaged shards, and drop them and other damaged files from the manifest.

    Afterwards the manifest says `complete: false`, and the merge command that made the artifact repairs it. A damaged
    manifest is removed; the merge rebuilds it from the sidecars.

    Args:
        location: of the artifact.
        report: result of `verify`; removed files are added to it.

    Raises:
        UserError: the location cannot be written to.
    """
    if location.is_read_only:
        raise UserError(f"{location.url}: http(s) locations are read-only; repair the artifact where it is stored")
    bad_files = {problem.file for problem in report.problems}
    bad_shards = {problem.shard for problem in report.problems if problem.shard is not None}
    for shard in sorted(bad_shards):
        if location.exists(commit_path(shard)):
            _remove(location, commit_path(shard), report)
    if MANIFEST in bad_files:
        if location.exists(MANIFEST):
            _remove(location, MANIFEST, report)
        return
    manifest = parse(Manifest, location.read(MANIFEST), MANIFEST)
    kept = [entry for entry in manifest.shards if entry.shard not in bad_shards]
    files = tuple(file for file in manifest.files if file.path not in bad_files)
    if len(kept) < len(manifest.shards) or files != manifest.files:
        changes = {"complete": False, "shards": Columns(ShardEntry, kept), "files": files}
        location.write(MANIFEST, dump(manifest.model_copy(update=changes)))


def _remove(location: Location, path: str, report: Report) -> None:
    location.remove(path)
    report.removed.append(path)


def _paths(location: Location) -> set[str]:
    """All files below the location except hidden ones; empty over http(s), which cannot list files."""
    if location.is_read_only:
        return set()
    return {path for path in location.files() if not any(part.startswith(".") for part in path.split("/"))}


def _manifest(location: Location, sidecars: Sequence[int], report: Report) -> Manifest | None:
    """The manifest; None, with a problem in the report, if it is missing or damaged."""
    try:
        manifest = parse(Manifest, location.read(MANIFEST), MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        if not sidecars:
            raise NotAnArtifact(f"{location.url}: expected an artifact, found no {MANIFEST} there") from None
        cause: str | None = "the file is missing"
    except UnknownVersion:
        raise
    except (SchemaError, CorruptShard) as error:
        cause = str(error).removeprefix(f"{MANIFEST}: ")
    else:
        cause = _other_plan(location, manifest)
    if cause is None:
        return manifest
    report.problems.append(Problem(MANIFEST, cause))
    return None


def _other_plan(location: Location, manifest: Manifest) -> str | None:
    """Why the manifest does not belong to this artifact; None if at least one sidecar has its plan."""
    if plan_sha256(manifest.layout, manifest.provenance) != manifest.plan_sha256:
        return "plan_sha256 does not match its layout and provenance"
    other: str | None = None
    for entry in manifest.shards:
        try:
            plan = parse(Commit, location.read(commit_path(entry.shard)), "").plan_sha256
        except (FileNotFoundError, IsADirectoryError, SchemaError, CorruptShard):
            continue
        if plan == manifest.plan_sha256:
            return None
        other = other or plan
    return other and f"it has plan {manifest.plan_sha256[:12]}…, the sidecars have plan {other[:12]}…"


class _ShardCheck:
    """Checks one shard per call. Thread-safe."""

    def __init__(self, location: Location, manifest: Manifest | None) -> None:
        self._location, self._manifest = location, manifest

    def __call__(self, shard: int, entry: ShardEntry | None) -> _ShardFindings:
        path = commit_path(shard)
        try:
            commit = self._sidecar(path, shard, entry)
        except (SchemaError, CorruptShard) as error:
            problem = Problem(path, str(error).removeprefix(f"{path}: "), shard)
            return _ShardFindings(0, 0, {path}, (problem,))
        problems: list[Problem] = []
        for file in commit.files:
            cause = damage(self._location, file)
            if cause is not None:
                lost = list(self._lost_records(commit, file.path))
                note = "" if lost else "; the arrays of its records are not affected"
                problems += [Problem(file.path, cause + note, shard), *lost]
        files = {path, *(file.path for file in commit.files)}
        return _ShardFindings(len(commit.records), commit.bytes, files, tuple(problems))

    def _sidecar(self, path: str, shard: int, entry: ShardEntry | None) -> Commit:
        """The sidecar of a shard; raises SchemaError or CorruptShard unless it is the one that the manifest lists."""
        try:
            data = self._location.read(path)
        except (FileNotFoundError, IsADirectoryError):
            raise CorruptShard(f"{path}: the manifest lists this shard, its sidecar is missing") from None
        commit = parse(Commit, data, path)
        if commit.shard != shard:
            raise CorruptShard(f"{path}: it is the sidecar of shard {commit.shard}")
        if self._manifest is None:
            return commit
        if commit.plan_sha256 != self._manifest.plan_sha256:
            raise CorruptShard(f"{path}: it belongs to another artifact, with plan {commit.plan_sha256[:12]}…")
        if entry is None and (self._manifest.complete or shard >= self._manifest.layout.shards):
            raise CorruptShard(f"{path}: the manifest lists no such shard")
        if entry is not None and ShardEntry.of(commit, hashlib.sha256(data).hexdigest()) != entry:
            raise CorruptShard(f"{path}: it is not the sidecar that the manifest lists")
        return commit

    def _lost_records(self, commit: Commit, path: str) -> Iterator[Problem]:
        """The records that cannot be read: none if the damage is in headers, padding or JSON members."""
        if self._manifest is None:
            return
        store = store_of(self._manifest.layout)
        specs = store.shard_files(commit.shard).get(path, ())
        reader = store.reader(self._location)
        for index, record in enumerate(commit.records):
            try:
                read_arrays(reader, commit, index, specs, check=True)
            except CorruptShard as error:
                # The reader's message begins with the file and the record, which the problem names already.
                yield Problem(path, str(error).partition(": ")[2], commit.shard, record.key)


def _shard_of(store: Store, path: str) -> int | None:
    """The planned shard that has a file with this path; None if there is none."""
    numbers = {int(digits) for digits in re.findall(r"(?<!\d)\d{1,16}(?!\d)", path)}
    fitting = (n for n in numbers if n < store.layout.shards and path in store.shard_files(n))
    return next(fitting, None)


def _unlisted_files(manifest: Manifest, paths: set[str], bad_shards: set[int | None]) -> Iterator[Problem]:
    """Problems of unlisted files, except those that a merge will write (unfinished artifacts, damaged shards)."""
    store = store_of(manifest.layout)
    expected = {CARD, CROISSANT, KEYS, PREVIEW}  # every merge overwrites them
    if not manifest.complete:
        expected |= {HEAD, *store.metadata_files()}
    for path in sorted(paths - expected):
        # Derived from the paths that exist: there may be many more planned shards.
        shard = _shard_of(store, path)
        if shard is not None and (shard in bad_shards or not manifest.complete):
            continue
        cause = "neither the manifest nor a sidecar lists this file; move it out of the artifact"
        yield Problem(path, cause, stray=True)
