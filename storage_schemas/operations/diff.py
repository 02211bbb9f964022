"""Which groups of two artifacts differ, and how far."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from storage_schemas.artifact import Artifact
from storage_schemas.display import one_line
from storage_schemas.in_order import WINDOW, in_order
from storage_schemas.operations.shards import Advance
from storage_schemas.schema.arguments import check_not_negative
from storage_schemas.schema.manifest import MOMENTS
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.provenance import differences, leaves
from storage_schemas.schema.record import Record

QUANTITIES = ("mean", "variance", "target", "members", "clean")
_THEIR_ARRAYS = {*MOMENTS, "target", "members", "clean"}


@dataclass(frozen=True)
class GroupDifference:
    """A group that both artifacts have and that differs between them.

    Attributes:
        key: of the group.
        facts: other differences (`count`, `label`, `samples`), as [in A, in B].
        distance: largest absolute difference of each quantity: mean, variance and target in their units, members and
            clean in grey levels, other arrays in stored units; None where shapes differ or only one artifact has it.
    """

    key: str
    facts: dict[str, list[Any]]
    distance: dict[str, float | None]


@dataclass(frozen=True)
class Difference:
    """How two artifacts differ. Different `settings` (format, encoding, provenance) do not make them unequal.

    Attributes:
        compared: number of groups that both have.
        only_in_a, only_in_b: keys.
        different: groups that both have and that differ by more than the tolerance.
        furthest: largest distance over all groups, by quantity.
        head: whether the class heads differ.
        settings: dotted name → [in A, in B].
    """

    compared: int
    only_in_a: list[str]
    only_in_b: list[str]
    different: list[GroupDifference]
    furthest: dict[str, float]
    head: bool
    settings: dict[str, list[Any]]

    @property
    def equal(self) -> bool:
        """Whether all groups and the class heads are equal, up to the tolerance."""
        return not (self.only_in_a or self.only_in_b or self.different or self.head)

    def __repr__(self) -> str:
        groups = f"{len(self.different)} of {self.compared} groups differ"
        others = f"{len(self.only_in_a)} only in A", f"{len(self.only_in_b)} only in B"
        heads = ("heads differ",) if self.head else ()
        return one_line(self, "", "equal" if self.equal else "not equal", groups, *others, *heads)

    def as_json(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def diff(a: Artifact, b: Artifact, tolerance: float = 0.0, advance: Advance = lambda _: None) -> Difference:
    """Compare every group, reading both artifacts once; their sidecars and one pair of groups are in memory.

    Two encodings of the same moments differ by float32 rounding: give a tolerance.

    Args:
        a, b: any format, encoding and order of groups.
        tolerance: largest absolute difference that is ignored.
        advance: called with the number of groups of A compared since the last call.

    Raises:
        ConfigError: a tolerance below 0.
    """
    check_not_negative("tolerance", tolerance)
    a, b = a.keeping_sidecars(), b.keeping_sidecars()
    places = {key: index for index, key in enumerate(_keys(b))}
    partners = [places.pop(key, None) for key in _keys(a)]
    records = in_order(a, range(len(a)), WINDOW // 2)
    others = in_order(b, (index for index in partners if index is not None), WINDOW // 2)
    only_in_a, different, compared = [], [], 0
    furthest: dict[str, float] = {}
    with closing(records), closing(others):
        for record, partner in zip(records, partners, strict=True):
            advance(1)
            if partner is None:
                only_in_a.append(record.key)
                continue
            compared += 1
            found = _compare(record, next(others), tolerance)
            for name, value in found.distance.items():
                if value is not None:
                    furthest[name] = max(furthest.get(name, 0.0), value)
            if found.facts or any(value is None or value > tolerance for value in found.distance.values()):
                different.append(found)
    return Difference(compared, only_in_a, list(places), different, furthest, _heads_differ(a, b), _settings(a, b))


def _keys(artifact: Artifact) -> Iterator[str]:
    return (entry.key for commit in artifact.commits() for entry in commit.records)


def _compare(a: Record, b: Record, tolerance: float) -> GroupDifference:
    """All quantities in which two records are not bit-equal."""
    facts = {
        name: [values[0], values[1]]
        for name in ("count", "label", "samples")
        if (values := (getattr(a, name), getattr(b, name)))[0] != values[1]
    }
    distance: dict[str, float | None] = {}
    # Integers are compared before they are rounded to float32, unless the other side has only float32.
    exact = a.encoding == b.encoding == "uint8_moments"
    others = sorted((a.arrays.keys() | b.arrays.keys()) - _THEIR_ARRAYS)
    for name in (*QUANTITIES, *others):
        mine, theirs = _quantity(a, name, exact), _quantity(b, name, exact)
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None or mine.shape != theirs.shape:
            distance[name] = None
        elif not np.array_equal(mine, theirs):
            distance[name] = float(np.abs(mine - theirs).max())
    return GroupDifference(a.key, facts, distance)


def _quantity(record: Record, name: str, exact: bool) -> npt.NDArray[np.float64] | None:
    if exact and name in ("mean", "variance"):
        unit = LEVELS * record.count
        if name == "mean":
            return record.arrays["sum"].astype(np.float64) / unit
        return record.arrays["scatter"].astype(np.float64) / unit**2
    value = getattr(record, name) if name in QUANTITIES else record.arrays.get(name)
    return None if value is None else np.asarray(value, np.float64)


def _heads_differ(a: Artifact, b: Artifact) -> bool:
    heads = a.head(), b.head()
    if heads[0] is None or heads[1] is None:
        return heads[0] is not heads[1]
    (mine, my_names), (theirs, their_names) = heads[0], heads[1]
    return (
        my_names != their_names
        or mine.keys() != theirs.keys()
        or not all(np.array_equal(mine[name], theirs[name]) for name in mine)
    )


def _settings(a: Artifact, b: Artifact) -> dict[str, list[Any]]:
    facts = []
    for artifact in (a, b):
        manifest = artifact.manifest
        named = {"format": manifest.layout.format, "encoding": manifest.layout.encoding}
        facts.append({**named, **leaves(manifest.provenance, "provenance")})
    return differences(facts[0], facts[1])
