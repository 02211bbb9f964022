"""JSON trees, such as provenances, leaf by leaf: `attack.epsilon`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from storage_schemas.errors import UserError, shortened

Leaves = dict[str, JsonValue]
# Names of leaves that say where things were; hashes say what they were.
LOCATIONS = ("url", "spec")


def leaves(tree: Mapping[str, Any], path: str = "") -> Leaves:
    """A JSON tree as dotted path → value; lists are values."""
    found: Leaves = {}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else key
        if isinstance(value, Mapping) and value:
            found |= leaves(value, at)
        else:
            found[at] = value
    return found


def tree(flat: Mapping[str, JsonValue]) -> dict[str, Any]:
    """The JSON tree of dotted paths, as `leaves` takes it apart.

    Raises:
        UserError: a path that is a value and has others below it.
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
    """Paths, sorted, at which two trees differ: the values there, `missing` where a tree has none."""
    pairs = {path: [a.get(path, missing), b.get(path, missing)] for path in sorted(a.keys() | b.keys())}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def changes(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a message says of settings that are not those of before, one text a leaf."""
    different = differences(leaves(there), leaves(now))
    return [f"{path}: {shortened(old)} there, {shortened(new)} now" for path, (old, new) in different.items()]
