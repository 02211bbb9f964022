"""EXIF orientation in a merge: whether it is applied, how the plan records that, and the lines that report it."""

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
    """How a merge treats EXIF orientations.

    Attributes:
        exif: whether they are applied.
        recorded: whether the plan records it; plans of earlier releases do not, and ignored orientations.
    """

    exif: Exif
    recorded: bool = True

    @property
    def record(self) -> dict[str, str]:
        """The entry in the provenance of the source."""
        return {"exif": self.exif} if self.recorded else {}


def turning_of(config: MergeConfig, source: Source) -> Turning:
    """Take EXIF treatment from the settings, else from an existing artifact, else from the source's library.

    Raises:
        ConfigError: `exif` is set, but the images of the source have no EXIF data.
    """
    exif = exif_of(config.exif, source.kind)
    if config.exif != "transpose" and _begun_without(config.artifact):
        if exif == "transpose":
            say(f"{config.artifact} was begun with EXIF orientations ignored; they stay ignored")
        return Turning("ignore", recorded=False)
    return Turning(exif)


def _begun_without(artifact: str) -> bool:
    """Whether there is an artifact whose plan does not record the treatment of orientations."""
    location = Location(artifact)
    if not location.exists(MANIFEST):
        return False
    manifest = parse(Manifest, location.read(MANIFEST), f"{location.url}/{MANIFEST}")
    source = manifest.provenance.get("source")
    return isinstance(source, dict) and "exif" not in source


def say_remarks(remarks: Mapping[str, int], images: int, source: Source, exif: Exif) -> None:
    """Print a line for each kind of remark, with the number of images."""
    for line in describe_remarks(remarks, images, exif):
        say(f"{source.url}: {line}")
