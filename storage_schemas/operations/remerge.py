"""Merge the stored members again: fewer of them, or with other factors, without attacking anything.

The members are what was dear. From an artifact that kept them, every smaller group size and every kind of factors is
a matter of minutes, and each result is what a merge with these settings would have written: the attack draws each
member from the seed, the key and the member's number, whatever their count. Only what a record says of its attack's
loss is a mean over all members, so it is left out of smaller groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from storage_schemas.access.location import Location
from storage_schemas.artifact import Artifact
from storage_schemas.errors import ConfigError, shortened
from storage_schemas.operations.shards import Advance, changed, head_file, write_shards
from storage_schemas.schema.arguments import check_choice, check_count
from storage_schemas.schema.exact import exact_arrays, pixel_spread
from storage_schemas.schema.factors import FactorKind, factor_spec, stored_factors
from storage_schemas.schema.manifest import MOMENTS, ArraySpec, Layout, Manifest
from storage_schemas.schema.moments import ExactMoments
from storage_schemas.schema.provenance import are_clean
from storage_schemas.schema.record import Record, moment_specs
from storage_schemas.writer import ArtifactWriter


@dataclass(frozen=True)
class Remerge:
    """What the new groups hold.

    Attributes:
        members: the first so many members of each group; all if None.
        factors: number k of factors; none if None.
        factor_kind: see `storage_schemas.schema.factors`.
        keep_members: whether they are stored again.

    Raises:
        ConfigError: a number below 1, an unknown kind, or `keep_members` that is neither True nor False.
    """

    members: int | None = None
    factors: int | None = None
    factor_kind: FactorKind = "sketch"
    keep_members: bool = True

    def __post_init__(self) -> None:
        for name, count in (("members", self.members), ("factors", self.factors)):
            if count is not None:
                check_count(name, count)
        check_choice("factor_kind", self.factor_kind, FactorKind)
        if not isinstance(self.keep_members, bool):
            raise ConfigError(f"keep_members: expected True or False, found {shortened(self.keep_members)}")


def remerge(source: Artifact, target: Location, wanted: Remerge, advance: Advance = lambda _: None) -> Manifest:
    """Write `source`'s groups, merged again from their members, to `target`; an unfinished one is continued.

    Raises:
        ConfigError: groups that are no attacks, no members in the source, fewer than asked for, or more factors than
            they span.
    """
    layout = _layout(source, wanted)
    provenance = dict(source.manifest.provenance)
    grouping = provenance.get("grouping")
    stored = source.manifest.layout.array("members")
    if isinstance(grouping, dict):
        grouping = {name: value for name, value in grouping.items() if name != "factors"}
        kind = {"factors": wanted.factor_kind} if wanted.factors else {}
        if wanted.members is not None and stored is not None and wanted.members < stored.shape[0]:
            grouping |= {"members": wanted.members}
        provenance["grouping"] = {**grouping, **kind}
    seed = provenance.get("seed")

    def change(record: Record) -> Record:
        return _merged(record, layout, wanted, seed if isinstance(seed, int) else 0)

    writer = ArtifactWriter(target, layout, provenance)
    return write_shards(writer, head_file(source), partial(changed, source, change), advance)


def _layout(source: Artifact, wanted: Remerge) -> Layout:
    """The new arrays, in the order in which a merge has them."""
    old, url = source.manifest.layout, source.location.url
    stored = old.array("members")
    if stored is None and are_clean(source.manifest.provenance):
        raise ConfigError(
            f"{url}: expected stored members, found clean images, one a group; merge the source with "
            '`attack="pgd"` and `keep_members=True`'
        )
    if stored is None:
        raise ConfigError(f"{url}: expected stored members, found none; merge with `keep_members=True`")
    largest, shape = stored.shape[0], stored.shape[1:]
    grouping = source.manifest.provenance.get("grouping")
    kind = grouping.get("kind") if isinstance(grouping, dict) else None
    if kind not in (None, "adversarial") and (wanted.members is not None or wanted.factors is not None):
        raise ConfigError(
            f"{url}: expected groups of attacks, found {kind} groups, whose samples and targets would change; "
            "merge again with other `members`, or leave `members` and `factors` out"
        )
    count = wanted.members or largest
    if count > largest:
        raise ConfigError(f"members: expected at most the {largest} that {url} stores, found {count}")
    if wanted.factors is not None and wanted.factors >= count:
        raise ConfigError(
            f"factors: {count} members span {count - 1} directions, found {wanted.factors}; store fewer, or keep the "
            "members themselves"
        )
    spread = pixel_spread(source.manifest.provenance)
    arrays = moment_specs(old.encoding, shape, count, spread)
    arrays += [spec for spec in old.arrays if spec.name == "target"]
    if wanted.factors is not None:
        arrays.append(factor_spec(wanted.factors, count, spread, shape))
    if wanted.keep_members:
        arrays.append(ArraySpec(name="members", dtype=stored.dtype, shape=(count, *shape)))
    known = {*MOMENTS, "target", "factors", "members"}
    arrays += [spec for spec in old.arrays if spec.name not in known]
    return old.model_copy(update={"arrays": tuple(arrays)})


def _merged(record: Record, layout: Layout, wanted: Remerge, seed: int) -> Record:
    if record.members is None:
        raise ValueError("the layout has members")
    members = record.members[: wanted.members]
    arrays = {**record.arrays, **exact_arrays(ExactMoments.of(members), layout, record.key)}
    if wanted.factors is not None:
        arrays["factors"] = stored_factors(members, layout, wanted.factor_kind, seed, record.key)
    spec = layout.array("members")
    if spec is not None:
        padding = np.zeros((spec.shape[0] - len(members), *spec.shape[1:]), np.uint8)
        arrays["members"] = np.concatenate([members, padding])
    return Record(
        key=record.key,
        count=len(members),
        encoding=record.encoding,
        arrays={spec.name: arrays[spec.name] for spec in layout.arrays},
        label=record.label,
        samples=record.samples,
        info=record.info if len(members) == record.count else {},
    )
