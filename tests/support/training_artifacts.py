"""Small artifacts to train on: random 8-bit groups, optionally with targets, labels and members."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from datamerge.encoders import load_encoder
from storage_schemas import ArraySpec, ArtifactWriter, ExactMoments, Layout, Location, Record
from storage_schemas.schema.factors import factor_spec, stored_factors
from storage_schemas.schema.record import encode_exact

ENCODER = "mlp:1x4x4-8-6"
SHAPE, WIDTH, MEMBERS = (1, 4, 4), 6, 3
GROUPS, GROUPS_PER_SHARD = 10, 4


def write_artifact(path: Path, options: dict[str, Any]) -> None:
    """Write an artifact.

    Options: `seed`, `format`, `targets`, `labels`, `members`, `encoder` (None leaves it out of the provenance),
    `sha256` (of the encoder; None for the true one), `shape`, `width` and `scale` (of the target), `attack`, `clean`
    (the first member), `spread` (grey levels between clean image and members, which are independent images
    otherwise), `factors` (how many sketches of the covariance), `huge` (key of a record whose target overflows the
    loss), `head` (bytes of a head.safetensors).
    """
    shape, width = options.get("shape", SHAPE), options.get("width", WIDTH)
    arrays = [
        ArraySpec(name="sum", dtype="uint16", shape=shape),
        ArraySpec(name="scatter", dtype="uint32", shape=shape),
    ]
    if options.get("targets", True):
        arrays.append(ArraySpec(name="target", dtype="float32", shape=(width,)))
    if options.get("members", True):
        arrays.append(ArraySpec(name="members", dtype="uint8", shape=(MEMBERS, *shape)))
    if options.get("clean"):
        arrays.append(ArraySpec(name="clean", dtype="uint8", shape=shape))
    if "factors" in options:
        arrays.append(factor_spec(options["factors"], MEMBERS, 255, shape))
    layout = Layout(
        format=options.get("format", "webdataset"),
        encoding="uint8_moments",
        arrays=tuple(arrays),
        groups=GROUPS,
        groups_per_shard=GROUPS_PER_SHARD,
    )
    spec = options.get("encoder", ENCODER)
    provenance: dict[str, Any] = {"seed": options.get("seed", 7), "source": {"fingerprint": path.name}}
    if spec is not None:
        provenance["encoder"] = {"spec": spec, "sha256": options.get("sha256") or load_encoder(spec).sha256}
    if "attack" in options:
        provenance["attack"] = options["attack"]
    writer = ArtifactWriter(Location(path), layout, provenance)
    writer.begin({"head.safetensors": options["head"]} if "head" in options else {})
    rng = np.random.default_rng(options.get("seed", 3))
    for shard in range(layout.shards):
        first = shard * GROUPS_PER_SHARD
        numbers = range(first, min(first + GROUPS_PER_SHARD, GROUPS))
        writer.commit(shard, [_record(number, layout, rng, options) for number in numbers], [])
    writer.finish()


def _record(number: int, layout: Layout, rng: np.random.Generator, options: dict[str, Any]) -> Record:
    key = f"k{number}"
    members = rng.integers(0, 256, (MEMBERS, *options.get("shape", SHAPE))).astype(np.uint8)
    target = rng.normal(0, options.get("scale", 1), options.get("width", WIDTH)).astype(np.float32)
    if key == options.get("huge"):
        target[:] = 1e30
    clean = members[0]
    if "spread" in options:
        moved = clean + rng.integers(-options["spread"], options["spread"], members.shape, endpoint=True)
        members = moved.clip(0, 255).astype(np.uint8)
    arrays = {**encode_exact(ExactMoments.of(members), layout), "members": members, "target": target, "clean": clean}
    if "factors" in options:
        arrays["factors"] = stored_factors(members, layout, "sketch", 7, key)
    return Record(
        key=key,
        count=MEMBERS,
        encoding=layout.encoding,
        arrays={spec.name: arrays[spec.name] for spec in layout.arrays},
        label=number % WIDTH if options.get("labels") else None,
    )
