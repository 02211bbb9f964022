"""Operations on artifacts, for Python callers, with progress on stderr.

An artifact is given by its location (text, path or `Location`), or as an open `Artifact`. Operations that write an
artifact continue an unfinished one, and return it open.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from PIL import Image

from datamerge.runtime import Progress
from storage_schemas import Artifact, Location, Manifest, open_artifact
from storage_schemas.card.contact_sheet import contact_sheet
from storage_schemas.card.summary import summarise
from storage_schemas.operations.combine import plan_combination
from storage_schemas.operations.convert import convert as write_converted
from storage_schemas.operations.diff import Difference
from storage_schemas.operations.diff import diff as compare
from storage_schemas.operations.export import Kind
from storage_schemas.operations.export import export as write_groups
from storage_schemas.operations.remerge import Remerge
from storage_schemas.operations.remerge import remerge as write_remerged
from storage_schemas.schema.arguments import check_list
from storage_schemas.schema.manifest import EncodingName, Format
from storage_schemas.verify import Report
from storage_schemas.verify import fix as take_back
from storage_schemas.verify import verify as check_files

Place = str | os.PathLike[str] | Location
"""A folder or fsspec URL, or a `Location` if its driver needs options."""


def inspect(artifact: Place | Artifact) -> dict[str, Any]:
    """Sizes, encoding, ranges of the moments, rejects and provenance of an artifact, finished or not."""
    return summarise(_opened(artifact, partial=True))


def verify(artifact: Place | Artifact, *, fix: bool = False) -> Report:
    """Compare every file of an artifact with the committed sizes and hashes.

    Args:
        artifact: location of the artifact, or the artifact itself.
        fix: remove the commits of damaged shards, so that the merge that made the artifact writes them again.

    Returns:
        The problems, including those that `fix` has dealt with.
    """
    location = artifact.location if isinstance(artifact, Artifact) else _location(artifact)
    with ExitStack() as shown:
        progress: Progress | None = None

        def on_shard(done: int, total: int) -> None:
            nonlocal progress
            progress = progress or shown.enter_context(Progress("verify", total, "shards"))
            progress.advance(1)

        report = check_files(location, on_shard)
    if fix:
        take_back(location, report)
    return report


def preview(artifact: Place | Artifact, *, groups: int = 8, keys: Sequence[str] = ()) -> Image.Image:
    """A contact sheet with one row per group: clean image, members, mean, amplified difference, variance.

    Args:
        artifact: location of the artifact, or the artifact itself; finished or not.
        groups: number of groups to draw.
        keys: keys of the groups to draw; by default groups from all over the artifact.

    Raises:
        ConfigError: an unknown key, no group to draw, or an empty artifact.
    """
    return Image.open(io.BytesIO(contact_sheet(_opened(artifact, partial=True), groups, keys)))


def convert(
    source: Place | Artifact, target: Place, *, format: Format | None = None, encoding: EncodingName | None = None
) -> Artifact:
    """Write an artifact in another format or encoding; None keeps that of the source.

    Raises:
        UserError: the format or encoding is unknown or cannot hold these groups, or the target holds something else.
    """
    artifact = _opened(source)
    layout = artifact.manifest.layout
    form = layout.format if format is None else format, layout.encoding if encoding is None else encoding
    return _write(
        "convert", target, layout.groups, lambda place, advance: write_converted(artifact, place, *form, advance)
    )


def remerge(source: Place | Artifact, target: Place, settings: Remerge) -> Artifact:
    """Merge the stored members of an artifact again, without an attack: fewer members, or other factors.

    Raises:
        ConfigError: the source stores no members or too few, or they span fewer directions than `factors`.
    """
    artifact = _opened(source)
    groups = artifact.manifest.layout.groups
    return _write(
        "remerge", target, groups, lambda place, advance: write_remerged(artifact, place, settings, advance)
    )


def combine(artifacts: Sequence[Place | Artifact], target: Place, *, allow_different: Sequence[str] = ()) -> Artifact:
    """Write the union of artifacts; groups with the same key become one group with all their members.

    Args:
        artifacts: two or more artifacts.
        target: location of the union.
        allow_different: entries of the provenance, such as `attack.epsilon`, in which they may differ.

    Raises:
        UserError: the artifacts cannot be combined; the message lists every difference.
    """
    check_list("artifacts", artifacts)
    plan = plan_combination([_opened(artifact) for artifact in artifacts], allow_different)
    return _write("combine", target, plan.layout.groups, plan.write)


def diff(a: Place | Artifact, b: Place | Artifact, *, tolerance: float = 0.0) -> Difference:
    """Compare two artifacts group by group; differences up to `tolerance` count as equal.

    Raises:
        ConfigError: the tolerance is below 0.
    """
    first, second = _opened(a), _opened(b)
    with Progress("diff", len(first), "groups") as progress:
        return compare(first, second, tolerance, progress.advance)


def export(artifact: Place | Artifact, keys: Sequence[str], folder: Place, *, kind: Kind = "npz") -> list[str]:
    """Write single groups in common file formats: all arrays as `npz`, or pictures as `png`.

    Returns:
        The names of the files in the folder.

    Raises:
        ConfigError: an unknown key or kind, or a file exists with other content; nothing is written.
    """
    return write_groups(_opened(artifact), keys, _location(folder), kind)


def _opened(artifact: Place | Artifact, partial: bool = False) -> Artifact:
    return artifact if isinstance(artifact, Artifact) else open_artifact(artifact, partial=partial)


def _location(place: Place) -> Location:
    return place if isinstance(place, Location) else Location(place)


def _write(
    verb: str, target: Place, groups: int, work: Callable[[Location, Callable[[int], None]], Manifest]
) -> Artifact:
    """Run an operation that writes an artifact, with a progress bar, and open the result."""
    location = _location(target)
    with Progress(verb, groups, "groups") as progress:
        work(location, progress.advance)
    return open_artifact(location)
