"""Whether EXIF turns a merge's images, what the plan records of that, and the line that says what was met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from datamerge.runtime.messages import say
from datamerge.sources import Source
from datamerge.sources.images import describe_remarks
from datamerge.sources.orientation import Exif, exif_of
from merge_service.config import MergeConfig
from storage_schemas import Location, Manifest
from storage_schemas.schema.manifest import MANIFEST, parse


@dataclass(frozen=True)
class Turning:
    """What is done about orientations.

    Attributes:
        exif: whether they are applied.
        recorded: whether the plan says so; plans from before there was a choice do not, and ignore them.
    """

    exif: Exif
    recorded: bool = True

    @property
    def record(self) -> dict[str, str]:
        """What the plan says of the source's images."""
        return {"exif": self.exif} if self.recorded else {}


def turning_of(config: MergeConfig, source: Source) -> Turning:
    """As the settings say, else as the artifact that is there was begun, else as the source's library does.

    Raises:
        ConfigError: a setting for images that have no EXIF data.
    """
    exif = exif_of(config.exif, source.kind)
    if config.exif != "transpose" and _begun_without(config.artifact):
        if exif == "transpose":
            say(f"{config.artifact} was begun with EXIF orientations ignored, which goes on")
        return Turning("ignore", recorded=False)
    return Turning(exif)


def _begun_without(artifact: str) -> bool:
    """Whether there is an artifact whose plan says nothing of orientations."""
    location = Location(artifact)
    if not location.exists(MANIFEST):
        return False
    manifest = parse(Manifest, location.read(MANIFEST), f"{location.url}/{MANIFEST}")
    source = manifest.provenance.get("source")
    return isinstance(source, dict) and "exif" not in source


def say_remarks(remarks: Mapping[str, int], images: int, source: Source, exif: Exif) -> None:
    """One line for each kind of image that was met, with their number."""
    for line in describe_remarks(remarks, images, exif):
        say(f"{source.url}: {line}")
