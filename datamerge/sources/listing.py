"""The files below a folder by what they hold, and what is left out of them: counted, and said in one line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datamerge.runtime.messages import say
from datamerge.sources.sample import check_listed
from datamerge.sources.suffixes import (
    MAGIC_BYTES,
    Kind,
    describe,
    kind_of,
    looks_like_image,
    packed_suffix,
    suffix_of,
)
from storage_schemas import Location, SourceError
from storage_schemas.schema.manifest import MANIFEST

File = tuple[str, int]
"""Path relative to the source, and bytes."""
Entry = tuple[str, int, bool]
"""A file, and whether it may be something else: a device, a pipe."""

HIDDEN, EMPTY = "hidden", "empty"
DEAD_LINKS, CYCLES = "links that lead nowhere", "links back to a folder above"
FORBIDDEN = "folders that may not be read"
# What file managers leave behind.
_JUNK = {"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information"}
# Beside a manifest these make a folder an artifact, finished or not.
_ARTIFACT_PARTS = ("commits", "shards", "groups.zarr", "source.json.gz")
# Files without a suffix that are all looked into; of more, so many are, and the others if one of these is an image.
ALL_SNIFFED, SAMPLE_SNIFFED = 1000, 64
SHOWN_REASONS = 8


@dataclass
class Listing:
    """What is below a folder.

    Attributes:
        location: the folder.
        files: by kind, sorted by path.
        others: bytes of the other files by path: tables, texts, and what nobody reads.
        left_out: how many files are not read, by reason.
        artifacts: sub-folders that are artifacts, whose files are left out.
    """

    location: Location
    files: dict[Kind, list[File]] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    artifacts: dict[str, int] = field(default_factory=dict)

    def of(self, kind: Kind) -> list[File]:
        """Files of a kind."""
        return self.files.get(kind, [])

    def leave(self, name: str, size: int) -> None:
        """Note a file that is not read."""
        self.others[name] = size
        self.left_out[_reason(name, size)] += 1

    def take(self, used: Iterable[str]) -> None:
        """Note that these other files are used after all."""
        for name in used:
            if name in self.others:
                self.left_out[_reason(name, self.others[name])] -= 1


def list_folder(location: Location) -> Listing:
    """The files below a folder; links to folders are followed, hidden and empty files left out.

    Raises:
        SourceError: the folder is an artifact, or a file to be read is a device or has a name that is no text.
    """
    listing = Listing(location)
    nameless: list[File] = []
    for name, size, is_odd in _walk(listing) if location.is_local else _find(listing):
        kind = kind_of(name)
        if is_odd and (kind is not None or not suffix_of(name)):
            check_listed(location, name)
        if not size and kind == "image":
            listing.leave(name, size)
        elif kind is not None:
            listing.files.setdefault(kind, []).append((name, size))
        elif suffix_of(name):
            listing.leave(name, size)
        else:
            nameless.append((name, size))
    for name, size in _sniffed(listing, nameless):
        listing.files.setdefault("image", []).append((name, size))
    for files in listing.files.values():
        files.sort()
        for name, _ in files:
            if not name.isascii():
                check_listed(location, name, "file")
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
    """Say what is not read, once."""
    for folder, count in listing.artifacts.items():
        say(f"{listing.location.url}: {folder} is an artifact, its {count} files are left out")
    if line := describe_left_out(listing.left_out):
        say(f"{listing.location.url}: {line}")


def is_artifact(names: Collection[str]) -> bool:
    """Whether a folder with entries of these names is an artifact, finished or not."""
    return MANIFEST in names and any(part in names for part in _ARTIFACT_PARTS)


def _walk(listing: Listing) -> Iterator[Entry]:
    """Files below a local folder: one `stat` a file, for its size, and one more a link."""
    location = listing.location
    root = location.path("")
    real = os.path.realpath(root)
    # Folder, its path in the source, its real path, and the real paths of folders whose links led here.
    waiting: list[tuple[str, str, str, tuple[str, ...]]] = [(root, "", real, ())]
    while waiting:
        folder, prefix, real, above = waiting.pop()
        try:
            with os.scandir(folder) as scanned:
                entries = list(scanned)
        except NotADirectoryError:
            raise SourceError(f"{location.url}: expected a file or a folder, found a device or a pipe") from None
        except PermissionError:
            if not prefix:
                raise SourceError(f"{location.url}: may not be read; change its permissions") from None
            listing.left_out[FORBIDDEN] += 1
            continue
        if _note_artifact(listing, prefix, {entry.name for entry in entries} if len(entries) < 100 else ()):
            listing.artifacts[prefix[:-1]] = sum(len(files) for _, _, files in os.walk(folder))
            continue
        for entry in entries:
            try:
                if is_junk(entry.name):
                    listing.left_out[HIDDEN] += 1
                elif not is_folder(entry):
                    yield f"{prefix}{entry.name}", entry.stat().st_size, not entry.is_file()
                elif (inside := _entered(entry, real, above)) is None:
                    listing.left_out[CYCLES] += 1
                else:
                    waiting.append((entry.path, f"{prefix}{entry.name}/", *inside))
            except OSError:  # a link that leads nowhere, or to itself
                listing.left_out[DEAD_LINKS] += 1


def _entered(entry: os.DirEntry[str], real: str, above: tuple[str, ...]) -> tuple[str, tuple[str, ...]] | None:
    """Real path of a folder, and those that links left on the way to it; None where it leads back."""
    if not entry.is_symlink():
        return f"{real}/{entry.name}", above
    target = os.path.realpath(entry.path)
    left = (*above, real)
    return None if any(f"{folder}/".startswith(f"{target}/") for folder in left) else (target, left)


def _find(listing: Listing) -> Iterator[Entry]:
    """Files below a folder of an object store."""
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
            continue  # what consoles write to show an empty folder
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
        SourceError: the source itself is one.
    """
    found = is_artifact(names)
    if found and not prefix:
        raise SourceError(
            f"{listing.location.url}: expected raw images, found an artifact; name the images that it was made from"
        )
    return found


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a folder is one, or a link to one; a link to itself is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or something that file managers leave behind."""
    return name[0] == "." or name.lower() in _JUNK


def _is_hidden(path: str) -> bool:
    return any(map(is_junk, filter(None, path.split("/"))))


def _sniffed(listing: Listing, files: Sequence[File]) -> list[File]:
    """Those of the files without a suffix that are images; the others are left out.

    Few are all looked into. Of many it is some first: a data set either has suffixes or it has not.
    """
    location = listing.location
    step = 1 if len(files) <= ALL_SNIFFED else max(2, len(files) // SAMPLE_SNIFFED)
    images = _images(location, files[::step])
    if step > 1 and images and location.is_local:
        images = _images(location, files)
    elif step > 1:  # a request a file would be too many: all or none
        images = {name for name, size in files if size} if len(images) == len(files[::step]) else set()
    for name, size in files:
        if name not in images:
            listing.leave(name, size)
    return [(name, size) for name, size in files if name in images]


def _images(location: Location, files: Sequence[File]) -> set[str]:
    return {name for name, size in files if size and looks_like_image(_head(location, name))}


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
