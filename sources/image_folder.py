"""A folder of image files, nested as you like; first-level sub-folders are classes if every image is in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from sources.sample import Sample, Source, fingerprint, make_keys
from storage_schemas import Location, SourceError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class FolderReader:
    """Reads files below a folder."""

    location: Location

    def read(self, sample: Sample) -> bytes:
        return self.location.read(sample.name)


def open_image_folder(location: Location) -> Source:
    """List a folder.

    Raises:
        SourceError: no image file below it.
    """
    files = list_files(location, EXTENSIONS)
    if not files:
        raise SourceError(
            f"{location.url}: expected a folder with images ({' '.join(EXTENSIONS[:4])} …) or Parquet files, "
            "found none below it"
        )
    names = [name for name, _ in files]
    class_names = _class_names(names)
    labels = {name: label for label, name in enumerate(class_names)}
    samples = [
        Sample(key, name, labels[PurePosixPath(name).parts[0]] if labels else None)
        for key, name in zip(make_keys(names), names, strict=True)
    ]
    return Source(location.url, "image_folder", samples, class_names, fingerprint(files), FolderReader(location))


def list_files(location: Location, extensions: Sequence[str]) -> list[tuple[str, int]]:
    """Sorted (path relative to the location, bytes) of files with one of the extensions, hidden ones left out."""
    found = location.fs.find(location.root, detail=True)
    files = []
    for path, entry in found.items():
        name = path.removeprefix(location.root).lstrip("/")
        hidden = any(part.startswith(".") for part in PurePosixPath(name).parts)
        if not hidden and name.lower().endswith(tuple(extensions)):
            files.append((name, int(entry["size"])))
    return sorted(files)


def _class_names(names: Sequence[str]) -> list[str]:
    first = [PurePosixPath(name).parts for name in names]
    if any(len(parts) == 1 for parts in first):
        return []
    return sorted({parts[0] for parts in first})
