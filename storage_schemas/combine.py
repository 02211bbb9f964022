"""Several artifacts as one: every key once, a group with the members it has in all of them.

    same keys          the union of the groups' members: counts and sums add up, the scatter is recomputed from
                       integers (exact for `uint8_moments`; `float32` in float64, rounded once)
    different keys     the groups one after the other
    some in common     both, each by its key

Keys come in order of first appearance. All that can be refused is, before anything is written. Keys and
sidecars' facts are held in memory, arrays of one shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage_schemas.artifact import Artifact
from storage_schemas.compatibility import (
    COMBINED,
    FREE,
    LOCATIONS,
    SOURCE,
    Leaves,
    check_compatible,
    combined_provenance,
    is_under,
    leaves,
    origins,
    tree,
)
from storage_schemas.convert import head_file
from storage_schemas.derive import Advance, moment_specs, pixel_spread, write_shards
from storage_schemas.errors import ConfigError, UserError
from storage_schemas.location import Location
from storage_schemas.manifest import HEAD, ArraySpec, Layout, Manifest, RecordEntry, Reject
from storage_schemas.moments import LEVELS
from storage_schemas.unite import unite
from storage_schemas.writer import ArtifactWriter

# Two computations of one embedding may differ by rounding (another batch size), relative to its length.
TARGET_TOLERANCE = 1e-3
MOMENTS = ("sum", "scatter", "mean", "mean_square")


@dataclass(slots=True)
class Group:
    """Where the parts of a group are: (input, position, offset) each; and what its parts must agree on."""

    parts: list[tuple[int, int, int]]
    count: int
    label: int | None
    checksums: dict[str, str]
    samples: set[str] = field(default_factory=set)


@dataclass
class Union:
    """All groups of the inputs by key, and the keys for which there are rejects only."""

    groups: dict[str, Group] = field(default_factory=dict)
    slots: list[str] = field(default_factory=list)
    rejects: dict[str, list[Reject]] = field(default_factory=dict)
    overlap: bool = False


def combine(
    inputs: Sequence[Artifact],
    target: Location,
    allow_different: Sequence[str] = (),
    advance: Advance = lambda _: None,
) -> Manifest:
    """Write the union of `inputs` to `target`; an unfinished one is continued.

    Format and shard size are those of the first input.

    Args:
        inputs: two or more complete artifacts with the same encoding.
        target: where the new artifact goes.
        allow_different: names of the provenance, such as ``attack.epsilon``, in which the inputs may differ. An
            array that not all inputs have (``arrays.members``) is left out then.
        advance: told about progress.

    Raises:
        UserError: inputs that do not go together, with every difference.
    """
    if len(inputs) < 2:
        raise ConfigError(f"combine: expected two or more artifacts, found {len(inputs)}")
    urls = [artifact.location.url for artifact in inputs]
    _check_layouts(inputs)
    parts = [
        part
        for artifact in inputs
        for part in origins(artifact.manifest.provenance, artifact.manifest.plan_sha256, len(artifact))
    ]
    flat = [leaves(artifact.manifest.provenance) | _stored(artifact) for artifact in inputs]
    attacked = any("attack.kind" in part["leaves"] for part in parts)
    same_source = all(one.get("source.fingerprint") == flat[0].get("source.fingerprint") for one in flat)
    union = _collect(inputs, remember_samples=not attacked and same_source)
    free = [*FREE, *(SOURCE if not attacked or not union.overlap else ()), COMBINED]
    if union.overlap:
        if attacked:
            _check_no_repetition(urls, parts)
        if _targets_agree(inputs, union):
            free.append("encoder")  # equal targets come from one encoder; the one attacked may be another
    check_compatible(urls, flat, free, allow_different)
    sizes = {group.count for group in union.groups.values()}
    provenance = combined_provenance(parts, sizes.pop() if len(sizes) == 1 else None)
    spread = max(pixel_spread(tree(part["leaves"])) for part in parts)
    if any(is_under(name, ("source", "preprocessing")) for name in allow_different):
        spread = LEVELS  # members of one key may stem from different images then
    layout = _layout(inputs, union, spread)

    def make(shard: int) -> tuple[list[Any], list[Reject]]:
        first = shard * layout.groups_per_shard
        keys = union.slots[first : first + layout.groups_per_shard]
        records = [
            unite([inputs[i].read(position, offset) for i, position, offset in union.groups[key].parts], layout)
            for key in keys
            if key in union.groups
        ]
        return records, [reject for key in keys for reject in union.rejects.get(key, ())]

    return write_shards(ArtifactWriter(target, layout, provenance), head_file(inputs[0]), make, advance)


def _collect(inputs: Sequence[Artifact], remember_samples: bool) -> Union:
    """Read all sidecars; raises UserError for groups of one key that are not about the same thing."""
    union = Union()
    for number, artifact in enumerate(inputs):
        for position in range(len(artifact.shard_sizes)):
            commit = artifact.commit(position)
            for offset, entry in enumerate(commit.records):
                _add(union, inputs, entry, (number, position, offset), remember_samples)
            for reject in commit.rejects:
                union.rejects.setdefault(reject.key, []).append(reject)
    union.slots = [*union.groups, *(key for key in union.rejects if key not in union.groups)]
    if not union.slots:
        raise UserError(f"{inputs[0].location.url}: expected groups to combine, found none in any artifact")
    return union


def _add(
    union: Union, inputs: Sequence[Artifact], entry: RecordEntry, part: tuple[int, int, int], remember_samples: bool
) -> None:
    group = union.groups.get(entry.key)
    if group is None:
        facts = {name: sum for name, sum in entry.checksums.items() if name in ("target", "clean")}
        union.groups[entry.key] = Group([part], entry.count, entry.label, facts)
    else:
        union.overlap = True
        where = f"group {entry.key}: {inputs[group.parts[0][0]].location.url} and {inputs[part[0]].location.url}"
        if group.label != entry.label:
            raise UserError(f"{where} have different labels, {group.label} and {entry.label}")
        clean = group.checksums.get("clean"), entry.checksums.get("clean")
        if None not in clean and clean[0] != clean[1]:
            raise UserError(f"{where} were made from different clean images; the union of their members has no sense")
        shared = group.samples.intersection(entry.samples)
        if shared:
            raise UserError(f"{where} both hold the sample {min(shared)}; it would count twice")
        group.parts.append(part)
        group.count += entry.count
    if remember_samples:
        union.groups[entry.key].samples.update(entry.samples)


def _targets_agree(inputs: Sequence[Artifact], union: Union) -> bool:
    """Whether all groups with several parts have targets, equal ones; raises UserError for unequal ones."""
    readers = [artifact.only(["target"]) for artifact in inputs]
    found = False
    for key, group in union.groups.items():
        expected = None
        for number, position, offset in group.parts[1:]:
            checksum = inputs[number].commit(position).records[offset].checksums.get("target")
            if checksum is None or "target" not in group.checksums:
                return False
            found = True
            if checksum == group.checksums["target"]:
                continue
            if expected is None:
                first = group.parts[0]
                expected = readers[first[0]].read(first[1], first[2]).target
            target = readers[number].read(position, offset).target
            if expected is None or target is None:
                return False
            distance = float(np.linalg.norm(target - expected))
            if distance > TARGET_TOLERANCE * float(np.linalg.norm(expected)):
                urls = inputs[group.parts[0][0]].location.url, inputs[number].location.url
                raise UserError(
                    f"group {key}: its targets in {urls[0]} and {urls[1]} lie {distance:.3g} apart, "
                    f"{np.abs(target - expected).max():.3g} at most in one dimension; later rounds attack another "
                    "encoder, but targets have to come from the same one"
                )
    return found


def _check_no_repetition(urls: Sequence[str], parts: Sequence[dict[str, Any]]) -> None:
    """The same merge twice would give the same members twice."""
    ignored = ("numerics", "versions", "grouping.members")
    seen: list[Leaves] = []
    for part in parts:
        facts = {
            path: value
            for path, value in part["leaves"].items()
            if path.rpartition(".")[2] not in LOCATIONS and not is_under(path, ignored)
        }
        if facts.get("attack.random_start") is False:
            facts.pop("seed", None)
        if facts in seen:
            raise UserError(
                f"{', '.join(urls)}: the same merge occurs twice in these artifacts, its members would count "
                "twice; merge again with another --seed to add members"
            )
        seen.append(facts)


def _stored(artifact: Artifact) -> Leaves:
    """Facts that are no provenance and have to agree all the same, as leaves."""
    optional = {f"arrays.{s.name}": s.dtype for s in artifact.manifest.layout.arrays if s.name not in MOMENTS}
    heads = [file.sha256 for file in artifact.manifest.files if file.path == HEAD]
    return {**optional, **({"head.sha256": heads[0]} if heads else {})}


def _check_layouts(inputs: Sequence[Artifact]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        urls = f"{first.location.url} and {other.location.url}"
        encodings = first.manifest.layout.encoding, other.manifest.layout.encoding
        if encodings[0] != encodings[1]:
            raise UserError(
                f"{urls} have different encodings, {encodings[0]} and {encodings[1]}; bring one to the other's "
                "with `datamerge convert` first"
            )
        for spec in first.manifest.layout.arrays:
            found = other.manifest.layout.array(spec.name)
            shapes = [tuple(one.shape[1:] if one.name == "members" else one.shape) for one in (spec, found or spec)]
            if shapes[0] != shapes[1]:
                raise UserError(f"{urls}: expected {spec.name} of one shape, found {shapes[0]} and {shapes[1]}")


def _layout(inputs: Sequence[Artifact], union: Union, spread: int) -> Layout:
    old = inputs[0].manifest.layout
    largest = max((group.count for group in union.groups.values()), default=1)
    shape = next(spec.shape for spec in old.arrays if spec.name in MOMENTS)
    arrays = moment_specs(old.encoding, shape, largest, spread)
    for spec in old.arrays:
        if spec.name in MOMENTS or not all(artifact.manifest.layout.array(spec.name) for artifact in inputs):
            continue
        members = ArraySpec(name="members", dtype="uint8", shape=(largest, *spec.shape[1:]))
        arrays.append(members if spec.name == "members" else spec)
    return Layout(
        format=old.format,
        encoding=old.encoding,
        arrays=tuple(arrays),
        groups=len(union.slots),
        groups_per_shard=min(old.groups_per_shard, len(union.slots)),
    )
