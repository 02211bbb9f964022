"""Combine several artifacts into one: every key once, with the group's members from all of them.

    a key in several artifacts    the union of the groups' members: counts and sums add up, the scatter is recomputed
                                  from integers (exact for `uint8_moments`; `float32` in float64, rounded once)
    a key in one artifact         its group, copied

Keys are in order of first appearance. All checks are made before anything is written. Keys and record entries are
held in memory, arrays one shard at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from storage_schemas.access.location import Location
from storage_schemas.artifact import Artifact
from storage_schemas.errors import ConfigError, UserError
from storage_schemas.in_order import WINDOW, in_order
from storage_schemas.operations.compatibility import (
    FREE,
    SOURCE,
    check_compatible,
    check_names,
    combined_provenance,
    is_under,
    origins,
    settle_exif,
    settle_preprocessing,
)
from storage_schemas.operations.shards import Advance, Made, head_file, write_shards
from storage_schemas.operations.union import KEPT, unite
from storage_schemas.schema.arguments import check_list
from storage_schemas.schema.exact import pixel_spread
from storage_schemas.schema.manifest import COMBINED, HEAD, MOMENTS, ArraySpec, Layout, Manifest, RecordEntry, Reject
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.provenance import LOCATIONS, Leaves, leaves, tree
from storage_schemas.schema.record import Record, moment_specs
from storage_schemas.writer import ArtifactWriter

# Largest relative distance of two computations of one embedding, which may differ by rounding (another batch size).
TARGET_TOLERANCE = 1e-3


Part = tuple[int, int]
"""A part of a group: number of the input, index of the record in it."""


@dataclass(slots=True)
class Group:
    """The parts of a group, and the facts on which they must agree."""

    parts: list[Part]
    count: int
    label: int | None
    checksums: dict[str, str]
    samples: set[tuple[str, str]] = field(default_factory=set)


@dataclass
class Union:
    """All groups of the inputs.

    Attributes:
        groups: by key, in order of first appearance.
        slots: keys of the groups, followed by keys with rejects alone.
        rejects: rejected samples by key, without duplicates.
        repeated: whether any key occurs in several inputs.
        targets: whether all parts of groups with such a key have targets.
        unequal: parts whose target differs in any bit from that of their group's first part, with their keys.
    """

    groups: dict[str, Group] = field(default_factory=dict)
    slots: list[str] = field(default_factory=list)
    rejects: dict[str, dict[Reject, None]] = field(default_factory=dict)
    repeated: bool = False
    targets: bool = True
    unequal: list[tuple[str, Part]] = field(default_factory=list)


@dataclass(frozen=True)
class Combination:
    """A checked union, ready to be written: its inputs, groups, layout and provenance."""

    inputs: Sequence[Artifact]
    union: Union
    layout: Layout
    provenance: dict[str, Any]

    def write(self, target: Location, advance: Advance = lambda _: None) -> Manifest:
        """Write the new artifact; an unfinished one is continued.

        Args:
            target: where to write it.
            advance: called with the number of groups written since the last call.

        Raises:
            NotAnArtifact: the target holds something else.
        """
        writer = ArtifactWriter(target, self.layout, self.provenance)
        return write_shards(writer, head_file(self.inputs[0]), self._shards, advance)

    def _shards(self, shards: Sequence[int]) -> Made:
        parts = [self._records(number, shards) for number in range(len(self.inputs))]
        for shard in shards:
            records = [
                unite([next(parts[number]) for number, _ in group.parts], self.layout)
                for group in self._groups(shard)
            ]
            yield records, [reject for key in self._keys(shard) for reject in self.union.rejects.get(key, ())]

    def _records(self, number: int, shards: Sequence[int]) -> Iterator[Record]:
        """The records of one input that these shards need, in order."""
        groups = (group for shard in shards for group in self._groups(shard))
        indices = (index for group in groups for origin, index in group.parts if origin == number)
        return in_order(self.inputs[number], indices, WINDOW // len(self.inputs))

    def _keys(self, shard: int) -> list[str]:
        first = shard * self.layout.groups_per_shard
        return self.union.slots[first : first + self.layout.groups_per_shard]

    def _groups(self, shard: int) -> list[Group]:
        return [self.union.groups[key] for key in self._keys(shard) if key in self.union.groups]


def plan_combination(inputs: Sequence[Artifact], allow_different: Sequence[str] = ()) -> Combination:
    """Check that `inputs` can be combined, and plan their union. Reads all sidecars, and targets that differ.

    Format and shard size are those of the first input.

    Args:
        inputs: two or more complete artifacts with the same encoding.
        allow_different: names of the provenance, such as ``attack.epsilon``, in which the inputs may differ. An
            array that not all inputs have (``arrays.members``) is then left out.

    Raises:
        ConfigError: fewer than two inputs, or a name that is in no provenance.
        UserError: the inputs cannot be combined; the message lists every difference.
    """
    check_list("allow_different", allow_different)
    if len(inputs) < 2:
        raise ConfigError(f"artifacts: expected two or more, found {len(inputs)}")
    inputs = [artifact.keeping_sidecars() for artifact in inputs]
    urls = [artifact.location.url for artifact in inputs]
    _check_layouts(inputs)
    parts = [
        part
        for artifact in inputs
        for part in origins(artifact.manifest.provenance, artifact.manifest.plan_sha256, len(artifact))
    ]
    settled = settle_exif(settle_preprocessing([part["leaves"] for part in parts]))
    for part, own in zip(parts, settled, strict=True):
        part["leaves"] = own
    flat = [leaves(artifact.manifest.provenance) | _stored(artifact) for artifact in inputs]
    flat = settle_exif(settle_preprocessing(flat))
    check_names(flat, allow_different)
    attacked = any("attack.kind" in part["leaves"] for part in parts)
    union = _collect(inputs, [() if attacked else _identities(one) for one in flat])
    if union.repeated and attacked:
        _check_no_repetition(urls, parts)
    distance = _check_distance(inputs, union) if union.unequal else None
    free = [COMBINED, *FREE, *(SOURCE if not attacked or not union.repeated else ())]
    if union.repeated and union.targets and distance is None:
        free.append("encoder")  # equal targets prove that one encoder made them; the attacked encoders may differ
    check_compatible(urls, flat, free, allow_different)
    if distance is not None:
        raise UserError(distance)
    sizes = {group.count for group in union.groups.values()}
    provenance = combined_provenance(parts, sizes.pop() if len(sizes) == 1 else None)
    spread = max(pixel_spread(tree(part["leaves"])) for part in parts)
    if any(is_under(name, ("source", "preprocessing")) for name in allow_different):
        spread = LEVELS  # members of one key may then be attacks on different images
    return Combination(inputs, union, _layout(inputs, union, spread), provenance)


def _identities(flat: Leaves) -> tuple[str, ...]:
    """Identities of a source; two sources that share one have the same samples under the same names."""
    return tuple(str(flat[name]) for name in ("source.fingerprint", "source.url") if flat.get(name))


def _collect(inputs: Sequence[Artifact], sources: Sequence[tuple[str, ...]]) -> Union:
    """Read all sidecars and collect the groups by key.

    Args:
        inputs: the artifacts.
        sources: for each input the identities of its source, if members are samples, which may count only once.

    Raises:
        UserError: two groups of one key cannot be combined, or there are no groups.
    """
    union = Union()
    for number, artifact in enumerate(inputs):
        for position, commit in enumerate(artifact.commits()):
            for index, entry in zip(artifact.indices(position), commit.records, strict=True):
                samples = {(source, name) for source in sources[number] for name in entry.samples}
                _add(union, inputs, entry, (number, index), samples)
            for reject in commit.rejects:
                union.rejects.setdefault(reject.key, {})[reject] = None  # several inputs may have the same one
    union.slots = [*union.groups, *(key for key in union.rejects if key not in union.groups)]
    if not union.slots:
        raise UserError(f"{inputs[0].location.url}: expected groups to combine, found none in any artifact")
    return union


def _add(
    union: Union, inputs: Sequence[Artifact], entry: RecordEntry, part: Part, samples: set[tuple[str, str]]
) -> None:
    group = union.groups.get(entry.key)
    if group is None:
        facts = {name: sum for name, sum in entry.checksums.items() if name in KEPT}
        union.groups[entry.key] = Group([part], entry.count, entry.label, facts)
    else:
        union.repeated = True
        where = f"group {entry.key}: {inputs[group.parts[0][0]].location.url} and {inputs[part[0]].location.url}"
        if group.label != entry.label:
            raise UserError(f"{where} have different labels, {group.label} and {entry.label}")
        clean = group.checksums.get("clean"), entry.checksums.get("clean")
        if None not in clean and clean[0] != clean[1]:
            raise UserError(f"{where} were made from different clean images; their members cannot be combined")
        shared = group.samples & samples
        if shared:
            raise UserError(f"{where} both hold the sample {min(shared)[1]}; it would count twice")
        targets = group.checksums.get("target"), entry.checksums.get("target")
        union.targets &= None not in targets
        if targets[0] != targets[1]:
            union.unequal.append((entry.key, part))
        group.parts.append(part)
        group.count += entry.count
    union.groups[entry.key].samples |= samples


def _check_distance(inputs: Sequence[Artifact], union: Union) -> str | None:
    """A message about the first group whose targets differ by more than rounding; None if there is none."""
    readers = [artifact.only(["target"]) for artifact in inputs]
    for key, (number, index) in union.unequal:
        first, first_index = union.groups[key].parts[0]
        expected, target = readers[first][first_index].target, readers[number][index].target
        if expected is None or target is None:
            continue  # one of the inputs has no targets at all, which is reported as a difference of the arrays
        distance = float(np.linalg.norm(target - expected))
        if distance > TARGET_TOLERANCE * float(np.linalg.norm(expected)):
            return (
                f"group {key}: its targets in {inputs[first].location.url} and {inputs[number].location.url} lie "
                f"{distance:.3g} apart; rounds may attack different encoders, but their targets have to come from one"
            )
    return None


def _check_no_repetition(urls: Sequence[str], parts: Sequence[dict[str, Any]]) -> None:
    """Raise UserError if one merge occurs twice: it would contribute the same members twice."""
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
                "twice; merge again with another `seed` to add members"
            )
        seen.append(facts)


def _stored(artifact: Artifact) -> Leaves:
    """Facts outside the provenance that must agree as well, as leaves."""
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
    arrays = moment_specs(old.encoding, old.pixels, largest, spread)
    stored = [spec for artifact in inputs for spec in artifact.manifest.layout.arrays if spec.name == "scatter"]
    if any(spec.nbytes > arrays[1].nbytes for spec in stored):  # the provenance understates the spread
        arrays = moment_specs(old.encoding, old.pixels, largest, LEVELS)
    for spec in old.arrays:
        if spec.name in MOMENTS or not all(artifact.manifest.layout.array(spec.name) for artifact in inputs):
            continue
        if union.repeated and spec.name not in (*KEPT, "members"):
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
