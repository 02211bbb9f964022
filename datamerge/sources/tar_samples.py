"""Samples of tars as columns, in 28 bytes and the name per sample. M samples.

A sample consists of the members of one tar whose paths are equal up to the first dot of the file name. Values of
members and JSON fields are stored as codes, and only for columns that may hold labels or groups.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.coded import Coded
from datamerge.sources.columns import Values
from datamerge.sources.labels import LABEL_NAMES, NONE, NoClass, label_columns
from datamerge.sources.naming import Members
from datamerge.sources.sample import Columns, as_text
from datamerge.sources.suffixes import kind_of
from datamerge.sources.tar_headers import File, TarFiles
from storage_schemas import SourceError, read_json

JSON = "json"
LABEL_EXTENSION = "cls"
MAX_TEXT = 2**24  # bytes of a member with labels or captions
_IMAGE, _TEXT, _OTHER = range(3)
_NO_IMAGE = -1


@dataclass
class _Tar:
    """Samples of one tar.

    Attributes:
        places: index of each sample, by its path.
        starts, sizes: byte offset and size of each image; `_NO_IMAGE` if there is none.
        texts: content of the members that are read, by extension and sample.
    """

    name: str
    places: dict[str, int] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    texts: dict[str, dict[int, bytes]] = field(default_factory=dict)

    def complete(self) -> Sequence[int]:
        """Indices of the samples that have an image."""
        if _NO_IMAGE not in self.sizes:
            return range(len(self.sizes))
        return [place for place, size in enumerate(self.sizes) if size != _NO_IMAGE]


class TarSamples:
    """Collects the samples of tars that have an image.

    Args:
        columns: members and fields to read.
        column: another column that may hold labels.

    Attributes:
        found: number of samples, with or without an image.
        first_without: the first sample without an image.
        others: number of members that are not read, by extension.
        members: extensions of the members that are read, except JSON, in the order of their first occurrence.
        fields: fields of the first JSON member.
    """

    def __init__(self, columns: Columns, column: str | None = None) -> None:
        self.found = 0
        self.first_without: str | None = None
        self.others: Counter[str] = Counter()
        self.members: dict[str, None] = {}
        self.fields: list[str] = []
        self._columns = columns
        self._image = columns.image and columns.image.lower().removeprefix(".")
        self._roles: dict[str, int] = {}
        self._tars: list[str] = []
        self._of_tar: list[npt.NDArray[np.int32]] = []
        self._text, self._ends = bytearray(), array("q", [0])
        self._starts, self._sizes = array("q"), array("q")
        named = columns.label if columns.label != NONE else None
        self._labels = {name: Coded() for name in (named, column) if name is not None}
        self._groups = Coded()
        self._no_class: dict[str, NoClass] = {}
        self._present: set[str] = set()
        self._has_json = False
        self._late: set[str] = set()

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, name: str, files: TarFiles) -> None:
        """Add the samples of a tar.

        Raises:
            SourceError: a sample has several images, or a label is too long.
            ValueError: a file cannot be read; other errors are those of `TarFiles`.
        """
        tar = _Tar(name)
        places, starts, sizes, roles = tar.places, tar.starts, tar.sizes, self._roles
        for file in files:
            path = file.name
            slash = path.rfind("/") + 1
            dot = path.find(".", slash)
            if dot <= slash or (slash > 1 and path.startswith("__MACOSX")):
                continue
            stem = path[1:dot] if slash == 1 else path[:dot]
            place = places.setdefault(stem, len(sizes))
            if place == len(sizes):
                starts.append(_NO_IMAGE)
                sizes.append(_NO_IMAGE)
            extension = path[dot + 1 :].lower()
            role = roles.get(extension)
            if role is None:
                role = roles[extension] = self._role(extension)
            if role == _OTHER:
                self.others[extension] += 1
            elif file.problem:
                raise ValueError(f"{path!r} {file.problem}")
            elif role == _IMAGE:
                if sizes[place] != _NO_IMAGE:
                    raise self._second(name, file, extension)
                starts[place], sizes[place] = file.start, file.size
            elif file.size > MAX_TEXT:
                raise SourceError(f"{name}: expected a label in {path}, found {file.size} bytes")
            else:
                tar.texts.setdefault(extension, {})[place] = files.content(file)
        self._take(tar)

    def naming(self) -> Members:
        """Names and keys. The result takes over the buffers, so nothing can be added afterwards."""
        stems = pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._text))
        of_tar = np.concatenate(self._of_tar or [np.empty(0, np.int32)])
        starts, sizes = (np.frombuffer(column, np.int64) for column in (self._starts, self._sizes))
        return Members.of(self._tars, of_tar, stems, starts, sizes)

    def path(self, index: int) -> str:
        """The name of a sample, for messages."""
        tar = int(np.searchsorted(np.cumsum([len(some) for some in self._of_tar]), index, side="right"))
        return f"{self._tars[tar]}#{self._text[self._ends[index] : self._ends[index + 1]].decode()}"

    def is_incomplete(self, column: str) -> bool:
        """Whether JSON members were read before this column was known, so that values may be missing."""
        return column in self._late

    def has(self, column: str) -> bool:
        """Whether any sample has such a member or JSON field."""
        return column in self._present

    def labels(self, column: str, where: str) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Labels and class names; errors are those of `read_labels`."""
        if column in self._no_class:
            raise self._no_class[column]
        return self._labels[column].labels(where, (), self.path)

    def groups(self) -> Values | None:
        """Values of the group column, if there is one."""
        return None if self._columns.group is None else self._groups.values()

    def _role(self, extension: str) -> int:
        image, label = self._image, self._columns.label
        if extension == image if image else kind_of(f"x.{extension}") == "image":
            return _IMAGE
        is_label = extension in LABEL_NAMES if label is None else extension == label
        return _TEXT if is_label or extension in (self._columns.group, JSON) else _OTHER

    def _second(self, name: str, file: File, extension: str) -> SourceError:
        if self._image:
            return SourceError(f"{name}: expected one {extension} of each sample, found a second one: {file.name}")
        return SourceError(
            f"{name}: expected one image per sample, found a second one: {file.name}; set `image_column` to "
            f"an extension such as {extension}, or use no dots in the names of samples"
        )

    def _take(self, tar: _Tar) -> None:
        """Store the samples of a tar."""
        chosen, stems = tar.complete(), list(tar.places)
        self.found += len(stems)
        if len(chosen) < len(stems):
            if self.first_without is None:
                self.first_without = f"{tar.name}#{stems[tar.sizes.index(_NO_IMAGE)]}"
            stems = [stems[place] for place in chosen]
        self._take_texts(tar, chosen)
        encoded = [stem.encode() for stem in stems]
        self._text += b"".join(encoded)
        self._ends.extend(islice(accumulate(map(len, encoded), initial=self._ends[-1]), 1, None))
        self._starts.extend([tar.starts[place] for place in chosen])
        self._sizes.extend([tar.sizes[place] for place in chosen])
        self._of_tar.append(np.full(len(chosen), len(self._tars), np.int32))
        self._tars.append(tar.name)

    def _take_texts(self, tar: _Tar, chosen: Sequence[int]) -> None:
        """Store the values of columns that may hold labels or groups."""
        jsons = tar.texts.get(JSON, {})
        firsts = {
            extension: min((place for place in texts if tar.sizes[place] != _NO_IMAGE), default=None)
            for extension, texts in tar.texts.items()
            if extension not in self.members
        }
        first = firsts.pop(JSON, None)
        if first is not None and not self._has_json:
            self.fields = _fields(jsons[first])
        known = {extension: place for extension, place in firsts.items() if place is not None}
        self.members |= dict.fromkeys(sorted(known, key=known.__getitem__))
        if self._columns.label is None:
            self._note_columns()
        self._has_json |= first is not None
        group = [] if self._columns.group is None else [self._columns.group]
        values = _by_column(tar.texts, chosen, {*self._labels, *group})
        for column, coded in self._labels.items():
            if any(value is not None for value in values[column]):
                self._present.add(column)
            if column in self._no_class:
                continue
            try:
                coded.add(values[column])
            except NoClass as error:  # raised later, if this column is chosen
                self._no_class[column] = error
        for column in group:
            self._groups.add([None if value is None else as_text(value) for value in values[column]])

    def _note_columns(self) -> None:
        """Add columns that may hold labels, according to the members and fields so far."""
        if LABEL_EXTENSION in self.members:
            columns = [LABEL_EXTENSION]  # `cls` excludes all others
            self._labels = {column: coded for column, coded in self._labels.items() if column in columns}
        else:
            usual, others = label_columns([*self.members, *self.fields])
            columns = [*usual, *others]
        for column in columns:
            if column in self._labels:
                continue
            self._labels[column] = Coded()
            self._labels[column].add_coded([None], np.zeros(len(self), np.int32))
            if self._has_json:
                self._late.add(column)


def _by_column(
    texts: Mapping[str, Mapping[int, bytes]], chosen: Sequence[int], columns: Collection[str]
) -> dict[str, Any]:
    """By column, its value for each sample: from the member of this name, else from the JSON field; else None."""
    jsons = texts.get(JSON, {})
    members = {column: texts.get(column, {}) for column in columns}
    fields: dict[int, dict[str, Any]] = {}
    if jsons:
        asked = [place for place in chosen if any(place not in some for some in members.values())]
        fields = {place: _values(jsons[place], columns) for place in asked if place in jsons}
    return {
        column: [
            _decoded(some[place]) if place in some else fields[place].get(column) if place in fields else None
            for place in chosen
        ]
        for column, some in members.items()
    }


def _fields(text: bytes) -> list[str]:
    try:
        return [as_text(key) for key in read_json(text)]
    except (ValueError, TypeError):
        return []


def _decoded(text: bytes) -> str | None:
    try:
        return text.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return None


def _values(text: bytes, columns: Collection[str]) -> dict[str, Any]:
    """Some fields of a JSON member, without conversion."""
    try:
        get = read_json(text).get
    except (ValueError, AttributeError):
        return {}
    values = {column: get(column) for column in columns}
    return {column: as_text(value) if isinstance(value, str) else value for column, value in values.items()}
