"""Checks before a merge continues an existing artifact: its source, and settings of earlier releases."""

from __future__ import annotations

from typing import Any

from datamerge.runtime.messages import say, warn
from datamerge.sources import LISTING, Source
from merge_service.config import MergeConfig
from storage_schemas import Location, Manifest, SourceError
from storage_schemas.schema.manifest import MANIFEST, parse


def as_begun(config: MergeConfig) -> MergeConfig:
    """The settings, with `order` and `limit` adapted to an artifact that an earlier release began.

    Earlier releases kept the source's order, and their `limit` took the first samples; their plans record neither.
    """
    manifest = _manifest(Location(config.artifact))
    recorded = None if manifest is None else manifest.provenance.get("source")
    if manifest is None or "order" in manifest.provenance or not isinstance(recorded, dict):
        return config
    if "samples" not in recorded:  # not written by a merge
        return config
    changed: dict[str, Any] = {}
    if "order" not in config.model_fields_set:
        changed["order"] = "source"
    if config.limit is not None and recorded["samples"] == config.limit and "drawn_from" not in recorded:
        changed |= {"limit": None, "limit_first": config.limit}
    if changed:
        first = f", of the first {config.limit} samples" if "limit" in changed else ""
        name = "order" if "order" in changed else "limit"
        say(f"{name}: {config.artifact} was begun in the source's order{first}, which is kept")
    return config.model_copy(update=changed)


def check_source(artifact: str, source: Source) -> None:
    """Refuse to continue an artifact whose source has changed; warn where a change cannot be ruled out.

    Raises:
        SourceError: the source has changed; names the files that differ.
    """
    location = Location(artifact)
    manifest = _manifest(location)
    if manifest is None or not location.exists(LISTING):
        return
    recorded = manifest.provenance.get("source")
    if not isinstance(recorded, dict):
        return
    if recorded.get("fingerprint") == source.fingerprint:
        written = [] if manifest.complete else source.written_since(location.fs.modified(location.path(LISTING)))
        if written:
            warn(
                f"{source.url}: {len(written)} files, such as {written[0]}, were written after {artifact} was begun; "
                "their sizes are the same, their content was not compared. If the images changed, choose another "
                "output"
            )
        return
    changes = source.changes(location.read(LISTING))
    if changes:
        more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
        raise SourceError(
            f"{source.url} is not what {artifact} was begun from: {'; '.join(changes[:5])}{more}; restore it, or "
            "choose another output"
        )


def _manifest(location: Location) -> Manifest | None:
    if not location.exists(MANIFEST):
        return None
    return parse(Manifest, location.read(MANIFEST), f"{location.url}/{MANIFEST}")
