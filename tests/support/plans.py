"""Hashes of the plans of merges, and the sources of the golden plans."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from merge_service import MergeConfig
from merge_service.merge import prepare

ENCODER = "mlp:1x4x4-8-4"
FACTORY = "python:tests.support.plans:shapes"
LABELLED = ("folder", "table", "rows", "arrow", "tars", "arrays.npz", FACTORY)
GROUPED = ("table", "rows", "arrow", "tars", "arrays.npz")
"""Sources with a column `site`."""
GROUPINGS: dict[str, dict[str, Any]] = {
    "adversarial": {"grouping": "adversarial", "encoder": ENCODER, "members": 2, "steps": 1},
    "label": {"grouping": "label", "groups_per_shard": 2},
    "chunks": {"grouping": "label", "members": 2, "seed": 3, "groups_per_shard": 2},
    "cluster": {"grouping": "cluster", "clusters": 2, "cluster_by": "pixels"},
    "column": {"grouping": "column", "group_column": "site", "groups_per_shard": 2},
}


def shapes() -> list[tuple[Image.Image, int | None]]:
    """A user's data set: seven images of three classes, each with its own level of grey."""
    return [(Image.fromarray(np.full((4, 4), 30 * number, np.uint8)), number % 3) for number in range(7)]


def cases() -> list[tuple[str, str]]:
    """Every kind of source with every grouping that it supports."""
    return [
        (source, grouping)
        for source in LABELLED
        for grouping in GROUPINGS
        if grouping != "column" or source in GROUPED
    ]


def plan_of(folder: Path, source: str, grouping: str) -> dict[str, str]:
    """The hash of each part of a plan, without versions and the source's location."""
    settings = {"groups_per_shard": 3, "shape": "1x4x4", "order": "source", **GROUPINGS[grouping]}
    if "encoder" in settings:
        del settings["shape"]
    place = source if source.startswith("python:") else str(folder / source)
    config = MergeConfig.model_validate(
        {"source": place, "artifact": str(folder / "none"), "device": "cpu"} | settings
    )
    prepared = prepare(config, planning_only=True)
    found, plan = prepared.source, prepared.plan
    provenance = {name: value for name, value in plan.provenance.items() if name not in ("versions", "encoder")}
    provenance["source"] = {name: value for name, value in provenance["source"].items() if name != "url"}
    shards = range(plan.layout.shards)
    tasks = [
        [(group.key, group.label, [sample.key for sample in group.samples]) for group in plan.groups_of(shard)]
        for shard in shards
    ]
    items = [
        [(index, position, sample.key) for index, position, sample in plan.part(shard, part)]
        for shard in shards
        for part in range(plan.parts(shard))
        if plan.in_parts
    ]
    parts: dict[str, Any] = {
        "samples": [(sample.key, sample.name, sample.label, sample.group) for sample in found.samples],
        "classes": list(found.class_names),
        "fingerprint": found.fingerprint,
        "listing": hashlib.sha256(found.listing_bytes()).hexdigest(),
        "groups": tasks,
        "items": items,
        "layout": plan.layout.model_dump(mode="json"),
        "provenance": provenance,
    }
    return {name: hashlib.sha256(json.dumps(part).encode()).hexdigest()[:16] for name, part in parts.items()}
