"""Provenances: the identity of a plan, and JSON trees as dotted paths such as `attack.epsilon`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pydantic import JsonValue

from storage_schemas.errors import UserError, shortened
from storage_schemas.schema.manifest import Layout

Leaves = dict[str, JsonValue]
# Names of leaves that hold locations. They are no part of a plan's identity: hashes identify data and weights.
LOCATIONS = ("url", "spec")


def own_version() -> str:
    """Version of the installed distribution; `0+unknown` if the code is not installed."""
    try:
        return version("datamerge")
    except PackageNotFoundError:
        return "0+unknown"


def plan_sha256(layout: Layout, provenance: Mapping[str, Any]) -> str:
    """Identity of a plan: two runs with the same hash write the same shards.

    Entries named `url` and `spec` are left out: data and weights are identified by hashes, not by their locations.
    """
    document = {"layout": layout.model_dump(mode="json"), "provenance": without_locations(provenance)}
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def without_locations(tree: Any) -> Any:
    """A JSON tree without its entries named `url` and `spec`; lists are left as they are."""
    if isinstance(tree, Mapping):
        return {key: without_locations(value) for key, value in tree.items() if key not in LOCATIONS}
    return tree


def are_clean(provenance: Mapping[str, Any]) -> bool:
    """Whether each group is one clean image: then `attack` is null, while groups of samples have no such entry."""
    return provenance.get("attack", "") is None


def leaves(tree: Mapping[str, Any], path: str = "") -> Leaves:
    """The values of a JSON tree by dotted path; lists are values.

    Examples:
        >>> leaves({"attack": {"epsilon": "2/255", "steps": 10}})
        {'attack.epsilon': '2/255', 'attack.steps': 10}
    """
    found: Leaves = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            found |= leaves(value, at)
        else:
            found[at] = value
    return found


def tree(flat: Mapping[str, JsonValue]) -> dict[str, Any]:
    """The JSON tree with these values by dotted path; the inverse of `leaves`.

    Raises:
        UserError: a path has a value as well as other paths below it.
    """
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(f"provenance: {path}: expected nothing below {parent}, which has a value")
        node[name] = value
    return root


def differences(a: Leaves, b: Leaves, missing: Any = None) -> dict[str, list[Any]]:
    """The sorted paths at which two trees differ → [value in a, value in b], `missing` where a tree has no value."""
    pairs = {path: [a.get(path, missing), b.get(path, missing)] for path in sorted(a.keys() | b.keys())}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Phrases for a message about changed settings, one for each path."""
    different = differences(leaves(there), leaves(now))
    return [f"{path}: {shortened(old)} there, {shortened(new)} now" for path, (old, new) in different.items()]
