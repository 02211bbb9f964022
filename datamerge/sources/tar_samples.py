"""Samples of tars as columns, in 28 bytes and the name per sample, labels included. M samples.

A sample consists of the members of one tar whose paths are equal up to the first dot of the file name. Values of
members and JSON fields are stored as codes, and only for columns that may hold labels or groups.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.coded import Coded
from datamerge.sources.columns import Values
from datamerge.sources.labels import LABEL_NAMES, NONE, NoClass, label_columns
from datamerge.sources.naming import Members, buffers_of
from datamerge.sources.sample import Columns, as_text
from datamerge.sources.suffixes import kind_of
from datamerge.sources.tar_headers import TarFiles, TarLister
from datamerge.sources.tar_paths import SplitPaths, split
from storage_schemas import SourceError, read_json

JSON = "json"
LABEL_EXTENSION = "cls"
MAX_TEXT = 2**24  # bytes of a member with labels or captions
_IMAGE, _TEXT, _OTHER = range(3)

Column = tuple[list[Any], npt.NDArray[np.integer[Any]]]
"""A value per sample, as values and, by sample, their indices."""


@dataclass(frozen=True)
class _Texts:
    """The members of one extension that are read, of C samples.

    Attributes:
        contents: Arrow large binary.
        rows: int64 [C], index of each sample's content; -1 for none.
    """

    contents: pa.LargeBinaryArray
    rows: npt.NDArray[np.int64]

    def first(self) -> int | None:
        """The first sample with such a member."""
        found = np.flatnonzero(self.rows >= 0)
        return int(found[0]) if len(found) else None

    def of(self, sample: int) -> bytes | None:
        """The content of a sample's member."""
        row = int(self.rows[sample])
        content: bytes | None = None if row < 0 else self.contents[row].as_py()
        return content

    def column(self) -> Column:
        """The decoded texts."""
        chosen = self.contents.take(pa.array(self.rows, mask=self.rows < 0))
        coded = chosen.dictionary_encode(null_encoding="encode")
        return [_decoded(text) for text in coded.dictionary.to_pylist()], coded.indices.to_numpy()


class _Roles:
    """What members are for.

    Attributes:
        image: the extension of images in lower case, if it is given.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self.image = columns.image and columns.image.lower().removeprefix(".")
        self._known: dict[str, int] = {}

    def of(self, extension: str) -> int:
        """The role of members with an extension in lower case."""
        if extension not in self._known:
            self._known[extension] = self._found(extension)
        return self._known[extension]

    def wants(self, path: str, size: int) -> bool:
        """Whether the content of a file is going to be read."""
        extension = path.rpartition("/")[2].partition(".")[2].lower()
        return size <= MAX_TEXT and self.of(extension) == _TEXT

    def _found(self, extension: str) -> int:
        image, label = self.image, self._columns.label
        if extension == image if image else kind_of(f"x.{extension}") == "image":
            return _IMAGE
        is_label = extension in LABEL_NAMES if label is None else extension == label
        return _TEXT if is_label or extension in (self._columns.group, JSON) else _OTHER


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
        self._roles = _Roles(columns)
        self._lister = TarLister(self._roles.wants)
        self._tars: list[str] = []
        self._counts: list[int] = []
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

    def add(self, name: str, stream: Any, is_local: bool) -> None:
        """Add the samples of a tar.

        Args:
            name: path of the tar.
            stream: the tar.
            is_local: whether the stream has a file descriptor.

        Raises:
            SourceError: a sample has several images, or a label is too long.
            ValueError: a file cannot be read; other errors are those of `BROKEN`.
        """
        files = self._lister.files(stream, is_local)
        paths = split(files.names)
        coded = paths.stems.dictionary_encode()
        stems, samples = coded.dictionary, coded.indices.to_numpy()
        roles = np.array([self._roles.of(extension) for extension in paths.extensions], np.int64)[paths.codes]
        self._refuse(name, files, paths, samples, roles)
        for extension, count in zip(paths.extensions, np.bincount(paths.codes).tolist(), strict=True):
            if self._roles.of(extension) == _OTHER:
                self.others[extension] += count
        images = np.flatnonzero(roles == _IMAGE)
        image_of = np.full(len(stems), -1)
        image_of[samples[images]] = paths.rows[images]
        has_image = image_of >= 0
        self.found += len(stems)
        if not has_image.all():
            if self.first_without is None:
                self.first_without = f"{name}#{stems[int(has_image.argmin())].as_py()}"
            stems, image_of = stems.filter(pa.array(has_image)), image_of[has_image]
        self._take_texts(_texts(files, paths, samples, roles, has_image), len(stems))
        ends, text = buffers_of(stems)
        self._ends.frombytes((ends[1:] + self._ends[-1]).tobytes())
        self._text += text.data
        self._starts.frombytes(files.starts[image_of].tobytes())
        self._sizes.frombytes(files.sizes[image_of].tobytes())
        self._counts.append(len(stems))
        self._tars.append(name)

    def naming(self) -> Members:
        """Names and keys. The result takes over the buffers, so nothing can be added afterwards."""
        stems = pa.LargeStringArray.from_buffers(len(self), pa.py_buffer(self._ends), pa.py_buffer(self._text))
        of_tar = np.repeat(np.arange(len(self._tars), dtype=np.int32), self._counts)
        starts, sizes = (np.frombuffer(column, np.int64) for column in (self._starts, self._sizes))
        narrow = np.uint32 if sizes.max(initial=0) < 2**32 else np.int64
        return Members.of(self._tars, of_tar, stems, starts, sizes.astype(narrow))

    def path(self, index: int) -> str:
        """The name of a sample, for messages."""
        tar = int(np.searchsorted(np.cumsum(self._counts), index, side="right"))
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

    def _refuse(
        self,
        name: str,
        files: TarFiles,
        paths: SplitPaths,
        samples: npt.NDArray[np.integer[Any]],
        roles: npt.NDArray[np.int64],
    ) -> None:
        """Raise what is wrong with the first file of a tar that cannot be used, or with the tar after all files."""
        wrong: dict[int, Exception] = {}
        images = np.flatnonzero(roles == _IMAGE)
        if np.bincount(samples[images], minlength=1).max() > 1:
            _, firsts = np.unique(samples[images], return_index=True)
            second = int(np.delete(images, firsts)[0])
            extension = paths.extensions[paths.codes[second]]
            wrong[second] = self._second(name, files.names[paths.rows[second]].as_py(), extension)
        large = np.flatnonzero((roles == _TEXT) & (files.sizes[paths.rows] > MAX_TEXT))
        if len(large):
            row = paths.rows[large[0]]
            wrong[int(large[0])] = SourceError(
                f"{name}: expected a label in {files.names[row].as_py()}, found {files.sizes[row]} bytes"
            )
        for row, problem in files.problems.items():
            place = int(np.searchsorted(paths.rows, row))
            if place < len(paths.rows) and paths.rows[place] == row and roles[place] != _OTHER:
                wrong[place] = ValueError(f"{files.names[row].as_py()!r} {problem}")
        if wrong:
            raise wrong[min(wrong)]
        if files.damage is not None:
            raise files.damage

    def _second(self, name: str, path: str, extension: str) -> SourceError:
        if self._roles.image:
            return SourceError(f"{name}: expected one {extension} of each sample, found a second one: {path}")
        return SourceError(
            f"{name}: expected one image per sample, found a second one: {path}; set `image_column` to "
            f"an extension such as {extension}, or use no dots in the names of samples"
        )

    def _take_texts(self, texts: Mapping[str, _Texts], count: int) -> None:
        """Store the values of columns that may hold labels or groups, of the next samples."""
        firsts = {extension: some.first() for extension, some in texts.items() if extension not in self.members}
        first = firsts.pop(JSON, None)
        if first is not None and not self._has_json:
            self.fields = _fields(texts[JSON].of(first) or b"")
        known = {extension: place for extension, place in firsts.items() if place is not None}
        self.members |= dict.fromkeys(sorted(known, key=known.__getitem__))
        if self._columns.label is None:
            self._note_columns()
        self._has_json |= first is not None
        group = [] if self._columns.group is None else [self._columns.group]
        columns = _by_column(texts, count, {*self._labels, *group})
        for column, coded in self._labels.items():
            values, codes = columns[column]
            if any(value is not None for value in values):
                self._present.add(column)
            if column in self._no_class:
                continue
            try:
                coded.add_coded(values, codes)
            except NoClass as error:  # raised later, if this column is chosen
                self._no_class[column] = error
        for column in group:
            values, codes = columns[column]
            self._groups.add_coded([None if value is None else as_text(value) for value in values], codes)

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


def _texts(
    files: TarFiles,
    paths: SplitPaths,
    samples: npt.NDArray[np.integer[Any]],
    roles: npt.NDArray[np.int64],
    has_image: npt.NDArray[np.bool_],
) -> dict[str, _Texts]:
    """By extension, the members to read, of the samples that have an image."""
    found = {}
    for code, extension in enumerate(paths.extensions):
        places = np.flatnonzero((paths.codes == code) & (roles == _TEXT))
        if len(places):
            rows = np.full(len(has_image), -1)
            rows[samples[places]] = np.arange(len(places))  # the last member of a name counts
            found[extension] = _Texts(files.contents(paths.rows[places]), rows[has_image])
    return found


def _by_column(texts: Mapping[str, _Texts], count: int, columns: Collection[str]) -> dict[str, Column]:
    """By column, its value for each sample: from the member of this name, else from the JSON field; else None."""
    jsons = texts.get(JSON)
    found: dict[str, Column] = {}
    mixed = []
    for column in columns:
        member = texts.get(column)
        if member is not None and (jsons is None or (member.rows >= 0).all()):
            found[column] = member.column()
        elif jsons is None:
            found[column] = [None][:count], np.zeros(count, np.int32)
        else:
            mixed.append(column)
    if jsons is None or not mixed:
        return found
    rows: dict[str, list[Any]] = {column: [] for column in mixed}
    for sample in range(count):
        text = jsons.of(sample)
        fields = {} if text is None else _values(text, mixed)
        for column in mixed:
            content = texts[column].of(sample) if column in texts else None
            rows[column].append(fields.get(column) if content is None else _decoded(content))
    return found | {column: (values, np.arange(count)) for column, values in rows.items()}


def _fields(text: bytes) -> list[str]:
    try:
        return [as_text(key) for key in read_json(text)]
    except (ValueError, TypeError):
        return []


def _decoded(text: bytes | None) -> str | None:
    try:
        return None if text is None else text.decode("utf-8-sig").strip()
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
