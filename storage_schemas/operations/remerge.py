"""Merge the stored members again, fewer of them or with other factors, without a new attack.

Attacking the members was the expensive part. An artifact that keeps them can be merged again in minutes with any
smaller group size and any factors. The result equals what a merge with these settings would have written, because the
attack draws each member from the seed, the key and the member's number, independent of their count. The exception is
the attack's loss in a record's `info`: it is a mean over all members, so it is left out of smaller groups.
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
    """Settings of the new groups.

    Attributes:
        members: number of members, taken from the first of each group; None for all.
        factors: number k of factors; None for no factors.
        factor_kind: see `storage_schemas.schema.factors`.
        keep_members: whether the members are stored again.

    Raises:
        ConfigError: a number below 1, an unknown kind, or `keep_members` is neither True nor False.
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


def remerge(source: Artifact, target: Location, settings: Remerge, advance: Advance = lambda _: None) -> Manifest:
    """Merge the groups of `source` again from their members, and write them to `target`.

    An unfinished target is continued.

    Args:
        source: an artifact that keeps its members.
        target: where to write the new artifact.
        settings: settings of the new groups.
        advance: called with the number of groups written since the last call.

    Raises:
        ConfigError: the source keeps no members, has fewer than requested, or its groups are not adversarial; or
            there would be more factors than directions that the members span.
    """
    layout = _layout(source, settings)
    provenance = dict(source.manifest.provenance)
    grouping = provenance.get("grouping")
    stored = source.manifest.layout.array("members")
    if isinstance(grouping, dict):
        grouping = {name: value for name, value in grouping.items() if name != "factors"}
        kind = {"factors": settings.factor_kind} if settings.factors else {}
        if settings.members is not None and stored is not None and settings.members < stored.shape[0]:
            grouping |= {"members": settings.members}
        provenance["grouping"] = {**grouping, **kind}
    seed = provenance.get("seed")

    def change(record: Record) -> Record:
        return _merged(record, layout, settings, seed if isinstance(seed, int) else 0)

    writer = ArtifactWriter(target, layout, provenance)
    return write_shards(writer, head_file(source), partial(changed, source, change), advance)


def _layout(source: Artifact, settings: Remerge) -> Layout:
    """The new layout, with arrays in the same order as after a merge."""
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
    if kind not in (None, "adversarial") and (settings.members is not None or settings.factors is not None):
        raise ConfigError(
            f"{url}: expected groups of attacks, found {kind} groups, whose samples and targets would change; "
            "merge again with other `members`, or leave `members` and `factors` out"
        )
    count = settings.members or largest
    if count > largest:
        raise ConfigError(f"members: expected at most the {largest} that {url} stores, found {count}")
    if settings.factors is not None and settings.factors >= count:
        raise ConfigError(
            f"factors: {count} members span {count - 1} directions, found {settings.factors}; store fewer, or keep "
            "the members themselves"
        )
    spread = pixel_spread(source.manifest.provenance)
    arrays = moment_specs(old.encoding, shape, count, spread)
    arrays += [spec for spec in old.arrays if spec.name == "target"]
    if settings.factors is not None:
        arrays.append(factor_spec(settings.factors, count, spread, shape))
    if settings.keep_members:
        arrays.append(ArraySpec(name="members", dtype=stored.dtype, shape=(count, *shape)))
    known = {*MOMENTS, "target", "factors", "members"}
    arrays += [spec for spec in old.arrays if spec.name not in known]
    return old.model_copy(update={"arrays": tuple(arrays)})


def _merged(record: Record, layout: Layout, settings: Remerge, seed: int) -> Record:
    if record.members is None:
        raise ValueError("the layout has members")
    members = record.members[: settings.members]
    arrays = {**record.arrays, **exact_arrays(ExactMoments.of(members), layout, record.key)}
    if settings.factors is not None:
        arrays["factors"] = stored_factors(members, layout, settings.factor_kind, seed, record.key)
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
