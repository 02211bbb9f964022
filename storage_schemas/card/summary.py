"""What `datamerge inspect` and the dataset card tell, as plain data."""

from __future__ import annotations

from typing import Any

from storage_schemas.artifact import Artifact
from storage_schemas.schema.manifest import Commit, Manifest, Ranges, Reject


class Tally:
    """Facts about an artifact, counted sidecar by sidecar, so that each is read once and none is kept."""

    def __init__(self) -> None:
        self._groups = self._labelled = self._members = self._largest = 0
        self._smallest: int | None = None
        self._ranges: list[tuple[int, Ranges]] = []
        self._rejects: list[Reject] = []
        self._info: dict[str, list[float]] = {"attack_loss": [], "attack_loss_start": []}

    def add(self, commit: Commit) -> None:
        """Count the next shard; in the order of the manifest, on which the last digit of a mean depends."""
        counts = [record.count for record in commit.records]
        if counts:
            self._smallest = min(counts) if self._smallest is None else min(self._smallest, *counts)
            self._largest = max(self._largest, *counts)
        self._groups += len(counts)
        self._members += sum(counts)
        self._labelled += sum(record.label is not None for record in commit.records)
        if commit.ranges is not None:
            self._ranges.append((len(counts), commit.ranges))
        self._rejects += commit.rejects
        for name, values in self._info.items():
            values += [record.info[name] for record in commit.records if name in record.info]

    def facts(self, manifest: Manifest, url: str) -> dict[str, Any]:
        """Sizes, encoding, ranges over all shards, rejects, provenance."""
        ranges, pixels = self._ranges, manifest.layout.pixels
        values = 2 * self._groups * pixels[0] * pixels[1] * pixels[2]
        moments = {
            "mean_min": min((r.mean_min for _, r in ranges), default=None),
            "mean_max": max((r.mean_max for _, r in ranges), default=None),
            "variance_max": max((r.variance_max for _, r in ranges), default=None),
            "variance_mean": sum(n * r.variance_mean for n, r in ranges) / self._groups if ranges else None,
            "clipped_variances": sum(r.clipped_variances for _, r in ranges),
        }
        arrays = {spec.name: {"dtype": spec.dtype, "shape": list(spec.shape)} for spec in manifest.layout.arrays}
        return {
            "url": url,
            "schema_version": manifest.schema_version,
            "writer": manifest.writer,
            "complete": manifest.complete,
            "format": manifest.layout.format,
            "encoding": manifest.layout.encoding,
            "groups": self._groups,
            "planned_groups": manifest.layout.groups,
            "members": {"min": self._smallest or 0, "max": self._largest, "total": self._members},
            "shards": len(manifest.shards),
            "planned_shards": manifest.layout.shards,
            "bytes": manifest.bytes,
            "bytes_per_value": manifest.bytes / values if values else None,
            "pixels": list(pixels),
            "arrays": arrays,
            "labelled": self._labelled,
            "moments": moments,
            **{name: sum(found) / len(found) if found else None for name, found in self._info.items()},
            "rejects": [reject.model_dump() for reject in self._rejects],
            "provenance": manifest.provenance,
            "plan_sha256": manifest.plan_sha256,
        }


def summarise(artifact: Artifact) -> dict[str, Any]:
    """Facts about an artifact; reads every sidecar."""
    tally = Tally()
    for commit in artifact.commits():
        tally.add(commit)
    return tally.facts(artifact.manifest, artifact.location.url)
