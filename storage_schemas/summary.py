"""What `datamerge inspect` tells, as plain data."""

from __future__ import annotations

from typing import Any

from storage_schemas.artifact import Artifact


def summarise(artifact: Artifact) -> dict[str, Any]:
    """Facts about an artifact: sizes, encoding, ranges over all shards, rejects, provenance."""
    manifest = artifact.manifest
    commits = [artifact.commit(position) for position in range(len(manifest.shards))]
    counts = [record.count for commit in commits for record in commit.records]
    ranges = [(len(commit.records), commit.ranges) for commit in commits if commit.ranges is not None]
    pixels = manifest.layout.pixels
    values = 2 * len(counts) * pixels[0] * pixels[1] * pixels[2]
    moments = {
        "mean_min": min((r.mean_min for _, r in ranges), default=None),
        "mean_max": max((r.mean_max for _, r in ranges), default=None),
        "variance_max": max((r.variance_max for _, r in ranges), default=None),
        "variance_mean": sum(n * r.variance_mean for n, r in ranges) / len(counts) if ranges else None,
        "clipped_variances": sum(r.clipped_variances for _, r in ranges),
    }
    return {
        "url": artifact.location.url,
        "schema_version": manifest.schema_version,
        "writer": manifest.writer,
        "complete": manifest.complete,
        "format": manifest.layout.format,
        "encoding": manifest.layout.encoding,
        "groups": len(counts),
        "planned_groups": manifest.layout.groups,
        "members": {"min": min(counts, default=0), "max": max(counts, default=0), "total": sum(counts)},
        "shards": len(manifest.shards),
        "planned_shards": manifest.layout.shards,
        "bytes": manifest.bytes,
        "bytes_per_value": manifest.bytes / values if values else None,
        "pixels": list(pixels),
        "arrays": {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in manifest.layout.arrays},
        "labelled": sum(record.label is not None for commit in commits for record in commit.records),
        "moments": moments,
        "attack_loss": _mean_info(commits, "attack_loss"),
        "attack_loss_start": _mean_info(commits, "attack_loss_start"),
        "rejects": [reject.model_dump() for commit in commits for reject in commit.rejects],
        "provenance": manifest.provenance,
        "plan_sha256": manifest.plan_sha256,
    }


def _mean_info(commits: list[Any], name: str) -> float | None:
    values = [record.info[name] for commit in commits for record in commit.records if name in record.info]
    return sum(values) / len(values) if values else None
