"""Lists the files below a folder by kind, and counts those that are left out, by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from datamerge.runtime.messages import say
from datamerge.sources.sample import check_listed
from datamerge.sources.suffixes import (
    MAGIC_BYTES,
    PACKED,
    Kind,
    describe,
    kind_of,
    looks_like_image,
    packed_suffix,
    suffix_of,
)
from storage_schemas import Location, SourceError
from storage_schemas.schema.manifest import MANIFEST

if TYPE_CHECKING:
    from datamerge.sources.files import Collected, File, Files  # pyarrow takes half a second

Entry = tuple[str, int, bool]
"""(path, bytes, whether it may be a device or a pipe instead of a file)"""

HIDDEN, EMPTY = "hidden", "empty"
DEAD_LINKS, CYCLES = "links that lead nowhere", "links back to a folder above"
FORBIDDEN = "folders that may not be read"
# Files that file managers create.
_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
# A manifest beside one of these makes a folder an artifact, finished or not.
_ARTIFACT_PARTS = ("commits", "shards", "groups.zarr", "source.json.gz")
# Files that describe the data of a folder.
DESCRIPTIONS = ("classnames.txt", "state.json", "dataset_info.json", "dataset_dict.json")
TABLES = (".csv", ".tsv", ".jsonl")  # such as metadata.csv, train.csv, labels.csv
# Up to this many files without a suffix are all opened; of more, a sample, and the rest if the sample has an image.
ALL_SNIFFED, SAMPLE_SNIFFED = 1000, 64
SHOWN_REASONS = 8


@dataclass
class Listing:
    """The files below a folder.

    Attributes:
        location: the folder.
        files: files by kind, sorted by path; images are `Files`.
        others: size in bytes of other relevant files, by path: tables, descriptions and archives. Irrelevant files
            are only counted, as there may be one beside each of millions of images.
        left_out: number of files that are not read, by reason.
        artifacts: number of files in each sub-folder that is an artifact; these are left out.
    """

    location: Location
    files: dict[Kind, Sequence[File]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    artifacts: dict[str, int] = field(default_factory=dict)

    def of(self, kind: Kind) -> Sequence[File]:
        """Files of a kind."""
        return self.files.get(kind, ())

    def leave(self, name: str, size: int) -> None:
        """Record a file that is not read."""
        self.left_out[_reason(name, size)] += 1
        if name.lower().endswith((*TABLES, *PACKED)) or name.rpartition("/")[2] in DESCRIPTIONS:
            self.others[name] = size

    def take(self, used: Iterable[str]) -> None:
        """Record that some of the other files are used after all."""
        for name in used:
            if name in self.others:
                self.left_out[_reason(name, self.others[name])] -= 1


def list_folder(location: Location) -> Listing:
    """List the files below a folder. Links to folders are followed; hidden and empty files are left out.

    Raises:
        SourceError: the folder is an artifact, or a file to read is a device or has a name that is not UTF-8.
    """
    from datamerge.sources.files import Collected

    listing, images, nameless = Listing(location), Collected(), Collected()
    files: dict[Kind, list[File]] = {}
    for name, size, is_odd in _walk(listing) if location.is_local else _find(listing):
        kind = kind_of(name)
        if is_odd and (kind is not None or not suffix_of(name)):
            check_listed(location, name)
        if (kind is None and suffix_of(name)) or (kind == "image" and not size):
            listing.leave(name, size)
        elif kind is None:
            _note_nameless(listing, nameless, name, size)
        else:
            if not name.isascii():
                check_listed(location, name, "file")
            if kind == "image":
                images.add(name, size)
            else:
                files.setdefault(kind, []).append((name, size))
    without_suffix = nameless.files()
    for (name, size), is_image in zip(without_suffix, _sniffed(location, without_suffix), strict=True):
        if is_image:
            images.add(name, size)
        else:
            listing.leave(name, size)
    listing.files = {kind: sorted(some) for kind, some in files.items()}
    if len(images):
        listing.files["image"] = images.files()
    return listing


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """`12 files left out: 9 .txt, 2 hidden, 1 empty`; an empty text if there are none."""
    counts = sorted(((reason, count) for reason, count in left_out.items() if count > 0), key=lambda e: (-e[1], e[0]))
    if not counts:
        return ""
    total, rest = sum(count for _, count in counts), counts[SHOWN_REASONS:]
    shown = ", ".join(f"{count} {reason}" for reason, count in counts[:SHOWN_REASONS])
    more = f", {sum(count for _, count in rest)} of {len(rest)} other kinds" if rest else ""
    return f"{total} {'file' if total == 1 else 'files'} left out: {shown}{more}"


def say_left_out(listing: Listing) -> None:
    """Report the files that are not read."""
    for folder, count in listing.artifacts.items():
        say(f"{listing.location.url}: {folder} is an artifact, its {count} files are left out")
    if line := describe_left_out(listing.left_out):
        say(f"{listing.location.url}: {line}")


def is_artifact(names: Collection[str]) -> bool:
    """Whether a folder with entries of these names is an artifact, finished or not."""
    return MANIFEST in names and any(part in names for part in _ARTIFACT_PARTS)


def _note_nameless(listing: Listing, nameless: Collected, name: str, size: int) -> None:
    """Record a file without a suffix, whose content decides later."""
    try:
        nameless.add(name, size)
    except UnicodeEncodeError:  # an image with such a name is refused
        if looks_like_image(_head(listing.location, name)):
            check_listed(listing.location, name, "file")
        listing.leave(name, size)


def _walk(listing: Listing) -> Iterator[Entry]:
    """Files below a local folder, sorted by path, with one `stat` per file and two per link."""
    root = listing.location.path("")
    # For each open folder: its remaining entries, its path in the source, its real path, and the real paths of the
    # folders whose links led to it.
    waiting: list[tuple[list[os.DirEntry[str]], str, str, tuple[str, ...]]]
    waiting = [(_entries(listing, root, ""), "", os.path.realpath(root), ())]
    while waiting:
        entries, prefix, real, above = waiting[-1]
        if not entries:
            waiting.pop()
            continue
        entry = entries.pop()
        try:
            if is_junk(entry.name):
                listing.left_out[HIDDEN] += 1
                continue
            if not is_folder(entry):
                yield f"{prefix}{entry.name}", entry.stat().st_size, not entry.is_file()
                continue
            inside = _entered(entry, real, above)
        except OSError:  # a broken link, or one to itself
            listing.left_out[DEAD_LINKS] += 1
            continue
        if inside is None:
            listing.left_out[CYCLES] += 1
        else:
            below = f"{prefix}{entry.name}/"
            waiting.append((_entries(listing, entry.path, below), below, *inside))


def _entries(listing: Listing, folder: str, prefix: str) -> list[os.DirEntry[str]]:
    """Entries of a folder in reverse order of their paths; none if it is an artifact or unreadable."""
    location = listing.location
    try:
        with os.scandir(folder) as scanned:
            entries = list(scanned)
    except NotADirectoryError:
        raise SourceError(f"{location.url}: expected a file or a folder, found a device or a pipe") from None
    except PermissionError:
        if not prefix:
            raise SourceError(f"{location.url}: may not be read; change its permissions") from None
        listing.left_out[FORBIDDEN] += 1
        return []
    if _note_artifact(listing, prefix, {entry.name for entry in entries} if len(entries) < 100 else ()):
        listing.artifacts[prefix[:-1]] = sum(len(files) for _, _, files in os.walk(folder))
        return []
    # In the order of paths `a.png` precedes the files in `a`, as a dot precedes a slash.
    entries.sort(key=lambda entry: f"{entry.name}/" if is_folder(entry) else entry.name, reverse=True)
    return entries


def _entered(entry: os.DirEntry[str], real: str, above: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Real path of a folder, and of the folders whose links led to it; None if a link leads back to one."""
    if not entry.is_symlink():
        return f"{real}/{entry.name}", above
    target = os.path.realpath(entry.path)
    left = (*above, real)
    return None if any(f"{folder}/".startswith(f"{target}/") for folder in left) else (target, left)


def _find(listing: Listing) -> Iterator[Entry]:
    """Files below a folder of a remote store."""
    found = listing.location.files()
    tops: dict[str, set[str]] = {"": set()}
    for name in found:
        folder, _, base = name.rpartition("/")
        if base == MANIFEST:
            tops[f"{folder}/" if folder else ""] = set()
    for name in found:
        for prefix, names in tops.items():
            if name.startswith(prefix):
                names.add(name[len(prefix) :].partition("/")[0])
    inside = tuple(prefix for prefix, names in tops.items() if _note_artifact(listing, prefix, names))
    for name, entry in found.items():
        if entry["type"] == "directory" or name.endswith("/"):
            continue  # consoles write such entries for empty folders
        if inside and name.startswith(inside):
            folder = next(prefix for prefix in inside if name.startswith(prefix))[:-1]
            listing.artifacts[folder] = listing.artifacts.get(folder, 0) + 1
        elif _is_hidden(name):
            listing.left_out[HIDDEN] += 1
        else:
            yield name, int(entry["size"] or 0), entry["type"] != "file"


def _note_artifact(listing: Listing, prefix: str, names: Collection[str]) -> bool:
    """Whether a folder below the source is an artifact.

    Raises:
        SourceError: the source itself is an artifact.
    """
    found = is_artifact(names)
    if found and not prefix:
        raise SourceError(
            f"{listing.location.url}: expected raw images, found an artifact; name the images that it was made from"
        )
    return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; False for a link to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or created by a file manager."""
    return name[0] == "." or name.lower() in _JUNK


def _is_hidden(path: str) -> bool:
    return any(map(is_junk, filter(None, path.split("/"))))


def _sniffed(location: Location, files: Files) -> npt.NDArray[np.bool_]:
    """Which of the files without a suffix are images.

    Few files are all opened. Of many, a sample comes first, as a data set has suffixes throughout or not at all.
    """
    step = 1 if len(files) <= ALL_SNIFFED else max(2, len(files) // SAMPLE_SNIFFED)
    found = _are_images(location, files[::step])
    if step == 1:
        return found
    if location.is_local:
        return _are_images(location, files) if found.any() else np.zeros(len(files), np.bool_)
    # One request per file would be too many, so the sample decides for all.
    return (files.sizes > 0) & found.all()


def _are_images(location: Location, files: Sequence[File]) -> npt.NDArray[np.bool_]:
    looked = (size > 0 and looks_like_image(_head(location, name)) for name, size in files)
    return np.fromiter(looked, np.bool_, len(files))


def _head(location: Location, name: str) -> bytes:
    if not location.is_local:
        return location.read(name, 0, MAGIC_BYTES)
    try:
        with Path(location.path(name)).open("rb") as stream:
            return stream.read(MAGIC_BYTES)
    except OSError:
        return b""


def _reason(name: str, size: int) -> str:
    if not size:
        return EMPTY
    packed = packed_suffix(name)
    return packed or describe(suffix_of(name))
