"""WebDataset tars: local files, globs, braces, any fsspec URL.

A sample is the run of members that share the name before the first dot: KEY.jpg, KEY.cls, KEY.json, … . Tars are
listed once by their headers; readers then fetch single images by their byte ranges.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from datamerge.runtime.class_names import parse_class_names
from datamerge.runtime.messages import first_line, say, warn
from datamerge.sources.columns import Samples, Values, label_column
from datamerge.sources.images import BadImage
from datamerge.sources.labels import (
    LABEL_NAMES,
    NONE,
    Labels,
    NoClass,
    choose_column,
    read_labels,
    shown,
    warn_of_twins,
)
from datamerge.sources.naming import Listed
from datamerge.sources.sample import (
    Columns,
    Sample,
    Source,
    as_text,
    fingerprint,
    make_keys,
    make_listing,
)
from datamerge.sources.suffixes import EXTENSIONS, MAGIC_BYTES, PACKED, PACKED_MAGIC, kind_of
from storage_schemas import ConfigError, Location, SourceError, read_json

NAMES = "backslashreplace"  # of bytes in a member's name that are no text
# What tarfile raises for a file that is none, or is made to do harm.
_BROKEN = (tarfile.TarError, ValueError, IndexError, OverflowError, MemoryError, RecursionError)
LABEL_EXTENSION = "cls"
CLASS_NAMES = "classnames.txt"  # one a line, in label order, as CLIP_benchmark writes them beside its tars
MAX_TEXT = 2**24  # bytes of a member with labels or captions
MAX_MEMBER = 2**36  # bytes of any member; tarfile would seek beyond what file systems allow


@dataclass(frozen=True, slots=True)
class _Member:
    """Where an image is in its tar."""

    tar: str
    start: int
    size: int


@dataclass
class _Parts:
    """What a sample consists of."""

    image: _Member | None = None
    texts: dict[str, bytes] = field(default_factory=dict)


class TarReader:
    """Reads images by their byte ranges."""

    is_concurrent = True

    def __init__(self, folder: Location) -> None:
        self._folder = folder

    @property
    def is_remote(self) -> bool:
        return not self._folder.is_local

    def read(self, sample: Sample) -> bytes:
        tar, _, range_ = sample.name.rpartition("#")
        start, _, rest = range_.partition("+")
        size = int(rest.partition(" ")[0])
        data = self._folder.read(tar, int(start), int(start) + size)
        if len(data) != size:
            raise BadImage(f"{tar}: expected {size} bytes at {start}, found {len(data)}: the tar is cut short")
        return data


def open_tars(location: Location, url: str, files: Sequence[tuple[str, int]], columns: Columns) -> Source:
    """List the samples of tars below a location.

    Raises:
        SourceError: a file is no tar, or none has images.
    """
    found: dict[str, _Parts] = {}
    others: Counter[str] = Counter()
    for name, _ in files:
        with (
            _refused(location, name),
            location.open(name) as stream,
            tarfile.open(fileobj=stream, mode="r:", errors=NAMES) as tar,
        ):
            for info in _members(tar):
                _note_member(name, info, tar, found, others, columns)
    complete = [(key, parts, parts.image) for key, parts in found.items() if parts.image is not None]
    if not complete:
        expected = f"members {columns.image!r}" if columns.image else f"images ({' '.join(EXTENSIONS[:4])} …)"
        inside = f": {shown(f'{count} .{extension}' for extension, count in others.items())}" if others else ""
        inside += "; unpack them, and name the folder of the tars inside" if "tar" in others else ""
        raise SourceError(
            f"{url}: expected tars with {expected}, found none in {len(found)} samples of {len(files)}{inside}"
        )
    if len(complete) < len(found):
        first = next(key for key, parts in found.items() if parts.image is None)
        say(f"{url}: {len(found) - len(complete)} of {len(found)} samples have no image and are left out, as {first}")
    may_label = _say_other_images(others, url)
    (labels, names), unlabelled = _labels([(key, parts) for key, parts, _ in complete], may_label, columns, url)
    names = names or _class_names_beside(location, files[0][0], labels)
    keys = make_keys([f"{key.replace('.tar#', '-').replace('#', '-')}.image" for key, _, _ in complete])
    places = [f"{image.tar}#{image.start}+{image.size} {name.rpartition('#')[2]}" for name, _, image in complete]
    values = None
    if columns.group is not None:
        values = Values.of(_text(parts, columns.group) for _, parts, _ in complete)
    samples = Samples(Listed.of(places, keys), label_column(labels), values)
    listing = make_listing(location, files)
    identity = fingerprint([listing, samples.json_of(lambda part: [(s.name, s.label, s.group) for s in part])])
    return Source(url, "webdataset", samples, names, identity, TarReader(location), listing, location, unlabelled)


def _say_other_images(others: Mapping[str, int], url: str) -> list[str]:
    """Say how many images are left out, of kinds that the user did not name; the other kinds of members."""
    images = {extension: count for extension, count in others.items() if kind_of(f"x.{extension}") == "image"}
    if images:
        some = shown(f"{count} {extension}" for extension, count in images.items())
        say(f"{url}: {sum(images.values())} other images of the samples are left out: {some}")
    return sorted(others.keys() - images.keys())


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar; raises ValueError for a size that is negative, and would never end, or absurd."""
    for info in tar:
        if not info.offset < tar.offset < info.offset + MAX_MEMBER:
            raise ValueError(f"{info.name!r} claims {info.size} bytes")
        # A global header holds nothing that we use, and every later member would keep a copy.
        tar.pax_headers = {}
        yield info


@contextmanager
def _refused(location: Location, name: str) -> Iterator[None]:
    """Turn what tarfile raises into a SourceError."""
    try:
        yield
    except _BROKEN as error:
        head = location.read(name, 0, MAGIC_BYTES)
        packed = next((PACKED[suffix] for magic, suffix in PACKED_MAGIC.items() if head.startswith(magic)), None)
        raise SourceError(
            f"{location.url}/{name}: expected an uncompressed tar: {packed or first_line(error)}"
        ) from None


def _class_names_beside(location: Location, tar: str, labels: Sequence[int | None]) -> list[str]:
    """Class names of a file beside a tar, or in the folder that holds its folder; none if they are too few."""
    if location.is_read_only or all(label is None for label in labels):
        return []
    folder = tar.rpartition("/")[0]
    places = [(location, f"{folder}/{CLASS_NAMES}" if folder else CLASS_NAMES)]
    places.append((location, CLASS_NAMES) if folder else (location.split()[0], CLASS_NAMES))
    for place, name in places:
        if not place.exists(name):
            continue
        try:
            text = place.read(name).decode("utf-8-sig")
            names = [as_text(line) for line in parse_class_names(text, f"{place.url}/{name}", "classes")]
        except (UnicodeDecodeError, ConfigError) as error:
            warn(f"{error}; the names are left out")
            return []
        largest = max(label for label in labels if label is not None)
        if largest < len(names):
            return names
        warn(f"{place.url}/{name}: expected names of labels up to {largest}, found {len(names)}; they are left out")
    return []


def _note_member(
    name: str,
    info: tarfile.TarInfo,
    tar: tarfile.TarFile,
    found: dict[str, _Parts],
    others: Counter[str],
    columns: Columns,
) -> None:
    """Remember an image's place, the content of a member with labels or groups, or that there are others."""
    folder, _, base = info.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not info.isfile() or not dot or base.startswith(".") or folder.startswith("__MACOSX"):
        return
    key = f"{name}#{folder}/{stem}" if folder else f"{name}#{stem}"
    parts = found.setdefault(key, _Parts())
    extension = extension.lower()
    wanted = columns.image and columns.image.lower().removeprefix(".")
    is_image = extension == wanted if wanted else kind_of(f"x.{extension}") == "image"
    is_label = extension in LABEL_NAMES if columns.label is None else extension == columns.label
    if not (is_image or is_label or extension in (columns.group, "json")):
        others[extension] += 1
        return
    if info.issparse():
        raise ValueError(f"{info.name!r} is sparse; make the tar without --sparse")
    if not 0 <= info.size <= tar.offset - info.offset_data:
        raise ValueError(f"{info.name!r} claims {info.size} bytes at {info.offset_data}, next is {tar.offset}")
    if is_image:
        if parts.image is not None and wanted:
            raise SourceError(f"{name}: expected one {extension} of each sample, found a second one: {info.name}")
        if parts.image is not None:
            raise SourceError(
                f"{name}: expected one image a sample, found a second one: {info.name}; name the kind of member as "
                f"`image_column`, such as {extension}, or write no dot into the names of samples"
            )
        parts.image = _Member(name, info.offset_data, info.size)
    else:
        if info.size > MAX_TEXT:
            raise SourceError(f"{name}: expected a label in {info.name}, found {info.size} bytes")
        stream = tar.extractfile(info)
        parts.texts[extension] = stream.read() if stream else b""


def _labels(
    samples: Sequence[tuple[str, _Parts]], others: Collection[str], columns: Columns, url: str
) -> tuple[Labels, str]:
    """Labels from a member or a JSON field of each sample, and why there are none.

    Raises:
        SourceError: no sample has the member or field that the user named, or what it says is no label.
    """
    none: list[int | None] = [None] * len(samples)
    wanted, why = columns.label, ""
    column = wanted
    if wanted is None:
        column, why = _label_column([parts for _, parts in samples], columns.group, url)
        if column is None and not why:
            why = _no_label_member(samples, others, columns)
            say(f"{url}: no labels are read: {why}")
    if column is None or column == NONE:
        return (none, []), why
    raw = [_value(parts, column) for _, parts in samples]
    if wanted is not None and all(value is None for value in raw):
        raise SourceError(
            f"{samples[0][0]}: expected a member or JSON field {wanted!r} with the label, found none in "
            f"{len(samples)} samples"
        )
    where = f"{url}, {column!r}"
    try:
        labels, names = read_labels(raw, where, row=lambda index: samples[index][0])
    except NoClass as error:
        if wanted is not None:
            raise SourceError(f"{where}: expected whole numbers or names as labels, found {error}") from None
        why = f"{column!r} holds no labels of one class: {error}"
        warn(f"{url}: no labels are read: {why}")
        return (none, []), why
    warn_of_twins(names, where)
    return (labels, names), ""


def _label_column(samples: Sequence[_Parts], group: str | None, url: str) -> tuple[str | None, str]:
    """The extension of the members with labels, `cls` by default, or the JSON field; and why there is none."""
    if any(LABEL_EXTENSION in parts.texts for parts in samples):
        return LABEL_EXTENSION, ""
    members = dict.fromkeys(extension for parts in samples for extension in parts.texts if extension != "json")
    fields = next((_fields(parts) for parts in samples if "json" in parts.texts), [])
    return choose_column([name for name in (*members, *fields) if name != group], url)


def _no_label_member(samples: Sequence[tuple[str, _Parts]], others: Collection[str], columns: Columns) -> str:
    """Why no member holds labels: there are others, or images only, whose folders and tars are no classes."""
    fields = next((_fields(parts) for _, parts in samples if "json" in parts.texts), [])
    some = [name for name in (*others, *fields) if name != columns.group]
    if some:
        return f"none of the members and fields {shown(some)} is called cls or label; name one as `label_column`"
    return "the tars hold images only; add a member KEY.cls to each, or unpack them into a folder for each class"


def _fields(parts: _Parts) -> list[str]:
    try:
        return [as_text(key) for key in read_json(parts.texts["json"])]
    except (ValueError, TypeError):
        return []


def _value(parts: _Parts, column: str) -> Any:
    """A member's text, or the field of that name in the sample's JSON member, as it is there."""
    try:
        if column in parts.texts:
            return parts.texts[column].decode("utf-8-sig").strip()
        value = read_json(parts.texts.get("json", b"{}")).get(column)
    except (ValueError, AttributeError):
        return None
    return as_text(value) if isinstance(value, str) else value


def _text(parts: _Parts, column: str) -> str | None:
    """A member or field, as text."""
    value = _value(parts, column)
    return None if value is None else as_text(value)
