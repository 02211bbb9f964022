"""Whether artifacts may be combined according to their provenances, and the provenance of the result.

Provenances are compared leaf by leaf (`attack.epsilon`). Values that all inputs share keep their place; the others
are listed, input by input, under `combined`. An input that was combined itself is split into its parts again, so that
the result does not depend on the order in which artifacts are combined.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from storage_schemas.errors import ConfigError, UserError, shortened
from storage_schemas.schema.manifest import COMBINED
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import LOCATIONS, Leaves, differences, leaves, tree

# Entries that may differ because they do not change the meaning of a group. `attacked_encoder` is one of them: a
# later round attacks the tuned encoder, while its targets still come from the encoder of the first round.
FREE = ("seed", "order", "numerics", "versions", "attacked_encoder", "grouping.members", "source.kind")
# Entries that belong to an input, not to the union, even where all inputs agree.
OWN = ("grouping.members",)
# Entries that may differ if no group has members from several inputs, or if members are samples instead of attacks.
SOURCE = ("source.fingerprint", "source.samples", "source.drawn_from", "source.exif")

_PIXELS = "preprocessing"
_EXIF = "source.exif"
_MISSING = object()


def is_under(path: str, names: Collection[str]) -> bool:
    """Whether a path is one of these, or lies below one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


def origins(provenance: Mapping[str, Any], plan_sha256: str, groups: int) -> list[dict[str, Any]]:
    """The merges that an artifact consists of: `plan_sha256`, `groups` and full provenance as `leaves` of each."""
    shared = leaves({key: value for key, value in provenance.items() if key != COMBINED})
    parts = provenance.get(COMBINED)
    if not isinstance(parts, list):
        return [{"plan_sha256": plan_sha256, "groups": groups, "leaves": shared}]
    own = [name for name in shared if is_under(name, OWN)]
    shared = {path: value for path, value in shared.items() if path not in own}
    return [
        {
            "plan_sha256": part["plan_sha256"],
            "groups": part["groups"],
            "leaves": {**shared, **leaves(part["provenance"])},
        }
        for part in parts
    ]


def combined_provenance(parts: Sequence[Mapping[str, Any]], members: int | None) -> dict[str, Any]:
    """Provenance of the union of `origins`; `members` is the size of its groups, None if they differ."""
    flat = [part["leaves"] for part in parts]
    shared = {
        path: value
        for path, value in flat[0].items()
        if not is_under(path, OWN) and all(other.get(path, _MISSING) == value for other in flat[1:])
    }
    if any("grouping.members" in other for other in flat):
        shared["grouping.members"] = members
    entries = [
        {
            "plan_sha256": part["plan_sha256"],
            "groups": part["groups"],
            "provenance": tree({p: v for p, v in part["leaves"].items() if p not in shared or is_under(p, OWN)}),
        }
        for part in parts
    ]
    return {**tree(shared), COMBINED: entries}


def settle_preprocessing(flat: Sequence[Leaves]) -> list[Leaves]:
    """The same provenances, with equivalent preprocessings replaced by the most detailed one.

    Releases before 0.2.0 recorded less detail and no normalisation. A preprocessing that this release cannot read is
    kept, and is compared entry by entry.
    """
    named = [tree({path: value for path, value in one.items() if is_under(path, [_PIXELS])}) for one in flat]
    if all(one == named[0] for one in named):
        return list(flat)
    try:
        found = [Preprocessing.of_artifact(one, "provenance") for one in named]
    except ConfigError:
        return list(flat)
    known = [one for one in found if one is not None]
    fullest = max(known, key=lambda one: (one.is_complete, one.resize != "none"), default=None)
    if fullest is None or len(known) < len(found) or any(one.differences(fullest) for one in known):
        return list(flat)
    settled = leaves({_PIXELS: fullest.record()})
    return [{path: value for path, value in one.items() if not is_under(path, [_PIXELS])} | settled for one in flat]


def settle_exif(flat: Sequence[Leaves]) -> list[Leaves]:
    """The same provenances; if some record how EXIF orientation was treated, the others get `ignore`."""
    if not any(_EXIF in one for one in flat):
        return list(flat)
    return [one if _EXIF in one or _differs_within(one) else {**one, _EXIF: "ignore"} for one in flat]


def _differs_within(flat: Leaves) -> bool:
    """Whether an input was combined from artifacts that treat EXIF orientation differently."""
    parts: Any = flat.get(COMBINED)
    return isinstance(parts, list) and any(_EXIF in leaves(part["provenance"]) for part in parts)


def check_names(flat: Sequence[Leaves], allowed: Collection[str]) -> None:
    """Raise ConfigError for an allowed name that no input has."""
    paths = sorted({path for one in flat for path in one})
    for name in allowed:
        if not any(is_under(path, [name]) for path in paths):
            known = sorted({path.partition(".")[0] for path in paths})
            raise ConfigError(
                f"allow_different: expected a name in the provenance, such as attack.epsilon or one of "
                f"{', '.join(known)}, found {name}"
            )


def check_compatible(
    urls: Sequence[str], flat: Sequence[Leaves], free: Collection[str], allowed: Collection[str]
) -> None:
    """Check that the inputs differ in `free` and `allowed` paths alone.

    Raises:
        UserError: names every other difference, and how to allow it.
    """
    problems: dict[str, str] = {}
    for url, other in zip(urls[1:], flat[1:], strict=True):
        for path, values in differences(flat[0], other, _MISSING).items():
            if path.rpartition(".")[2] not in LOCATIONS and not is_under(path, [*free, *allowed]):
                mine, theirs = ("missing" if value is _MISSING else shortened(value) for value in values)
                problems.setdefault(path, f"{path}: {mine} in {urls[0]}, {theirs} in {url}")
    if problems:
        named = ", ".join(f'"{path}"' for path in sorted(problems))
        raise UserError(
            f"the artifacts cannot be combined: {'; '.join(problems[path] for path in sorted(problems))}; "
            f"to combine them nevertheless, set `allow_different=[{named}]`"
        )
