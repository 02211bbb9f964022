"""A folder of image files, at any depth. Classes come from labels.csv, or from sub-folders.

labels.csv has a column `file` (a path below the folder, or below its sub-folder `images`) and usually `label`; other
columns can name groups. One column of 0 and 1 per class also works. Without labels.csv, first-level sub-folders are
classes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc

from datamerge.runtime.messages import say, warn
from datamerge.sources.coded import Coded
from datamerge.sources.columns import NO_LABEL, Samples, Values, label_column
from datamerge.sources.file_list import FileList
from datamerge.sources.files import Files
from datamerge.sources.label_table import TABLE, LabelTable, read_label_table
from datamerge.sources.labels import (
    NONE,
    USUAL,
    Labels,
    NoClass,
    choose_column,
    label_columns,
    named_column,
    number_in,
    read_labels,
    shown,
    warn_of_twins,
)
from datamerge.sources.listing import is_artifact, is_folder, is_junk
from datamerge.sources.naming import Paths
from datamerge.sources.one_hot import OneHotColumns, find_one_hot
from datamerge.sources.sample import (
    Columns,
    Sample,
    Source,
    fingerprint,
)
from datamerge.sources.splits import is_split_column, warn_of_split_column
from storage_schemas import ConfigError, Location, SourceError


@dataclass(frozen=True)
class FolderReader:
    """Reads files below a folder."""

    location: Location

    is_concurrent = True

    @property
    def is_remote(self) -> bool:
        return not self.location.is_local

    def read(self, sample: Sample) -> bytes:
        return self.location.read(sample.name)


def open_image_folder(
    location: Location,
    files: Files,
    columns: Columns,
    skipped: int | None = None,
    known: Sequence[str] = (),
) -> Source:
    """List the images among the files of a folder.

    Args:
        location: the folder.
        files: the images.
        columns: columns of labels.csv.
        skipped: level of the folders that are splits, not classes.
        known: paths of other images, which labels.csv may name too.

    Raises:
        ConfigError: `image_column` is set.
        SourceError: labels.csv does not fit the images.
    """
    if columns.image is not None:
        raise ConfigError(
            f"image_column: the images of {location.url} are files, which have no columns, found {columns.image!r}; "
            "drop `image_column`"
        )
    broken = files.where(pc.match_substring(files.names, "\\").to_numpy(zero_copy_only=False)).names
    if len(broken):
        warn(
            f"{location.url}: {len(broken)} of {len(files)} names hold a backslash, such as {broken[0]}, which "
            "separates folders on Windows only; unpack the archive again with a program that makes folders"
        )
    values: Values | None = None
    class_names: list[str] = []
    unlabelled = ""
    if location.exists(TABLE):
        names = files.names.to_pylist()
        table = read_label_table(location.read(TABLE), [*names, *known], f"{location.url}/{TABLE}")
        (found, class_names), unlabelled = _table_labels(table, names, columns)
        labels = label_column(found)
        if columns.group is not None:
            values = Values.of(table.values(columns.group, names))
    elif wanted := columns.group or (columns.label if columns.label != NONE else None):
        raise SourceError(
            f"{location.url}: expected a {TABLE} with the column {wanted!r}, found none; add it (its header: "
            "file,label,…)"
        )
    elif columns.label != NONE:
        labels, class_names = _folder_labels(location, files, skipped)
    else:
        labels = np.full(len(files), NO_LABEL, np.int32)
    samples = Samples(Paths.of(files.names), labels, values)
    listing = FileList.of(location, files)
    identity = fingerprint([listing, samples.json_of_labels(), samples.json_of_groups()])
    reader = FolderReader(location)
    return Source(location.url, "image_folder", samples, class_names, identity, reader, listing, location, unlabelled)


def _table_labels(table: LabelTable, names: Sequence[str], columns: Columns) -> tuple[Labels, str]:
    """Labels from a column of labels.csv, or the reason why there are none."""
    _warn_of_columns(table, names, columns)
    others = [name for name in table.columns if name not in (table.file_column, columns.group)]
    if columns.label is not None:
        column, why = named_column(columns.label, table.columns, table.where), ""
        if column in others and not any(label_columns([column])):
            _warn_of_one_of_several(table, names, others, column)
    elif len(others) == 1:
        (column,), why = others, ""
        if column != USUAL[0]:
            say(f"{table.where}: labels are taken from {column!r}")
    else:
        column, why = choose_column(others, table.where)
    if column is None:
        if not why and others and columns.label is None:
            return _one_hot_labels(table, names, others)
        return ([None] * len(names), []), why
    try:
        labels, classes = read_labels(
            table.values(column, names), f"{table.where}, {column!r}", row=lambda index: table.line(names[index])
        )
    except NoClass as error:
        raise SourceError(f"{table.where}, {column!r}: expected whole numbers or names, found {error}") from None
    warn_of_twins(classes, table.where)
    return (labels, classes), ""


def _one_hot_labels(table: LabelTable, names: Sequence[str], others: Sequence[str]) -> tuple[Labels, str]:
    """Labels from one-hot columns, or the reason why there are none."""
    hot = _find_one_hot(table, names, others)
    if hot is not None and not hot.odd:
        say(f"{table.where}: the columns {shown(hot.names)} hold one 1 a row, taken as {len(hot.names)} classes")
        if missing := sum(label is None for name, label in zip(names, hot.labels, strict=True) if name in table.rows):
            say(f"{table.where}: {missing} of {len(names)} samples have no label: their cells are empty")
        warn_of_twins(hot.names, table.where)
        return (list(hot.labels), list(hot.names)), ""
    rest = [name for name in others if hot is None or name not in hot.names]
    reasons = []
    if hot is not None:
        reasons.append(
            f"the columns {shown(hot.names)} of {TABLE} hold 0 and 1, but not one 1 for {len(hot.odd)} of "
            f"{len(names)} images, first {table.line(names[hot.odd[0]])}, so they give no single label"
        )
    if rest:
        reasons.append(
            f"none of the columns {', '.join(rest)} of {TABLE} is called label; name one as `label_column`"
        )
    why = "; ".join(reasons)
    say(f"{table.where}: no labels are read: {why}")
    return ([None] * len(names), []), why


def _find_one_hot(table: LabelTable, names: Sequence[str], others: Sequence[str]) -> OneHotColumns | None:
    values = {}
    for name in others:
        with suppress(SourceError):  # an image may have several rows that differ, such as captions
            values[name] = table.values(name, names)
    return find_one_hot(values)


def _warn_of_one_of_several(table: LabelTable, names: Sequence[str], others: Sequence[str], column: str) -> None:
    """Warn if the chosen column is one of several one-hot columns: it tells only one class from the rest."""
    hot = _find_one_hot(table, names, others)
    if hot is None or column not in hot.names:
        return
    instead = f"{len(hot.odd)} images do not have one 1 in them" if hot.odd else "drop `label_column` to read all"
    warn(
        f"{table.where}: {column!r} is one of {len(hot.names)} columns of 0 and 1, {shown(hot.names)}; the labels "
        f"are its 0 and 1 alone; {instead}"
    )


def _warn_of_columns(table: LabelTable, names: Sequence[str], columns: Columns) -> None:
    """Warn about columns that share a name, and about columns of splits, as all splits are used."""
    for name, times in Counter(table.columns).items():
        if times > 1:
            warn(f"{table.where}: {times} columns are called {name!r}, of which the first is used; rename the others")
        if is_split_column(name) and name not in (columns.label, columns.group):
            place = table.columns.index(name)
            said = Counter(table.rows[image][0][1][place] for image in names if image in table.rows)
            warn_of_split_column(name, said, table.where)


def _folder_labels(location: Location, files: Files, skipped: int | None) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Labels from the sub-folders of the first level with several, without counting the level `skipped`.

    Images beside the sub-folders have no label. If all names of folders are whole numbers, these are the labels.
    """
    parts = [folder.split("/") if folder else [] for folder in files.folders]
    images = np.bincount(files.of_folder).tolist()
    splits = set() if skipped is None else {part.pop(skipped) for part in parts}
    level = _level(parts)
    folders = [part[level] if len(part) > level else None for part in parts]
    distinct = sorted({folder for folder in folders if folder is not None})
    beside = sum(count for count, folder in zip(images, folders, strict=True) if folder is None)
    if beside and (len(distinct) < 2 or beside * 2 >= len(files)):
        if distinct:
            say(
                f"{location.url}: {beside} of {len(files)} images are beside {len(distinct)} sub-folders, so "
                "these are not taken as classes"
            )
        return np.full(len(files), NO_LABEL, np.int32), []
    if beside:
        first = int(np.array([folder is None for folder in folders])[files.of_folder].argmax())
        warn(
            f"{location.url}: {beside} of {len(files)} images are beside the {len(distinct)} class folders and have "
            f"no label, such as {files[first][0]}"
        )
    coded = Coded()
    coded.add_coded(folders, files.of_folder)
    labels, classes = coded.labels(location.url, (), lambda index: files[index][0], folders=True)
    if distinct and not classes:
        classes = _numbered(distinct, location.url)
    if skipped is None or (len(splits) == 1 and skipped <= level):  # otherwise each split has its own class folders
        above = parts[0][:level]
        if skipped is not None:
            above.insert(skipped, *splits)
        _say_folders(location, "/".join(above), distinct)
    deeper = sum(count for count, part in zip(images, parts, strict=True) if len(part) > level + 1)
    if deeper:
        say(f"{location.url}: {deeper} of {len(files)} images are in folders below their class folder")
    warn_of_twins(classes, location.url)
    return labels, classes


def _level(parts: Sequence[Sequence[str]]) -> int:
    """The depth of the class folders: below the folders that all images share, if these hold several folders.

    Args:
        parts: components of the paths of all folders that contain images.
    """
    level = 0
    while all(len(part) > level + 1 and part[level] == parts[0][level] for part in parts):
        level += 1
    return level if level and len({part[level] for part in parts}) > 1 else 0


def _numbered(folders: Sequence[str], where: str) -> list[str]:
    """Names of folders that are numbers, ordered by value, if these count from 0; else empty.

    Raises:
        SourceError: two folders have the same value.
    """
    by_value: dict[int, str] = {}
    for folder in folders:
        value = number_in(folder, digits_only=True)
        if value is None or value < 0:
            continue
        if value in by_value:
            raise SourceError(
                f"{where}: expected one folder per class, found {by_value[value]} and {folder}, both label "
                f"{value}; rename one"
            )
        by_value[value] = folder
    first, last = min(by_value, default=0), max(by_value, default=0)
    if by_value:
        say(f"{where}: the class folders {by_value[first]} … {by_value[last]} are numbers, used as the labels")
    return [by_value[value] for value in range(last + 1)] if len(by_value) == last + 1 else []


def _is_readable_class(folder: Path) -> bool:
    """Whether a folder may be listed and is no artifact. One that may not be listed is counted in `left_out`."""
    try:
        return not is_artifact({path.name for path in folder.iterdir()})
    except PermissionError:
        return False


def _say_folders(location: Location, above: str, used: Sequence[str]) -> None:
    """Print where the class folders are, if not at the top, and warn about class folders without images.

    Object stores have no empty folders.
    """
    if above:
        say(f"{location.url}: all images are in {above}, whose {len(used)} sub-folders are the classes")
    elif len(used) == 1:
        say(f"{location.url}: all images are in {used[0]}, which is the only class")
    if not location.is_local:
        return
    with os.scandir(location.path(above) if above else location.root) as entries:
        folders = {entry.name: Path(entry.path) for entry in entries if not is_junk(entry.name) and is_folder(entry)}
    empty = sorted(name for name in folders.keys() - set(used) if _is_readable_class(folders[name]))
    if empty:
        warn(
            f"{location.url}: {len(empty)} of {len(folders)} class folders hold no image, {shown(empty)}; they "
            "are not classes"
        )
