"""A folder of image files, nested as you like. Classes come from labels.csv, or from first-level sub-folders.

labels.csv has a header with `file` (a path below the folder, or below its sub-folder `images`) and usually `label`;
other columns can name groups. Without it, first-level sub-folders are classes if every image is in one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from datamerge.sources.sample import (
    Columns,
    Sample,
    Source,
    fingerprint,
    make_keys,
    make_listing,
    text_labels,
    to_indices,
)
from storage_schemas import Location, SourceError

TABLE = "labels.csv"
FILE_COLUMNS = ("file", "filename", "file_name")
LABEL_COLUMN = "label"


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
    files: Sequence[tuple[str, int]],
    columns: Columns,
    skipped: int | None = None,
    known: Sequence[str] = (),
) -> Source:
    """List the images among the files of a folder.

    Args:
        location: the folder.
        files: the images.
        columns: of labels.csv.
        skipped: level of the folders that are splits, not classes.
        known: other files that labels.csv may name.

    Raises:
        SourceError: a labels.csv that does not go with the images.
    """
    names = [name for name, _ in files]
    groups: list[str | None] = [None] * len(names)
    if location.exists(TABLE):
        rows = _read_table(location, [*names, *known])
        labels, class_names = _column_labels(rows, names, columns.label, f"{location.url}/{TABLE}")
        if columns.group is not None:
            groups = _column(rows, names, columns.group, f"{location.url}/{TABLE}")
    elif wanted := columns.label or columns.group:
        raise SourceError(
            f"{location.url}: expected a {TABLE} with the column {wanted!r}, found none; add it (its header: "
            "file,label,…)"
        )
    else:
        labels, class_names = _folder_labels([_without_level(name, skipped) for name in names])
    samples = [
        Sample(key, name, label, group)
        for key, name, label, group in zip(make_keys(names), names, labels, groups, strict=True)
    ]
    listing = make_listing(location, files)
    identity = fingerprint([listing, labels, groups])
    reader = FolderReader(location)
    return Source(location.url, "image_folder", samples, class_names, identity, reader, listing, location)


def _without_level(path: str, level: int | None) -> str:
    """A path without its folder at a level."""
    if level is None:
        return path
    parts = path.split("/")
    return "/".join([*parts[:level], *parts[level + 1 :]])


def _folder_labels(names: Sequence[str]) -> tuple[list[int | None], list[str]]:
    parts = [PurePosixPath(name).parts for name in names]
    if any(len(part) == 1 for part in parts):
        return [None] * len(names), []
    return to_indices([part[0] for part in parts])


def _read_table(location: Location, names: Sequence[str]) -> dict[str, Mapping[str, str]]:
    """Rows of labels.csv by the image's path."""
    where = f"{location.url}/{TABLE}"
    try:
        reader = csv.DictReader(io.StringIO(location.read(TABLE).decode("utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{where}: expected a CSV table in UTF-8: {error}") from None
    column = next((name for name in FILE_COLUMNS if name in (reader.fieldnames or [])), None)
    if column is None:
        raise SourceError(f"{where}: expected a column {FILE_COLUMNS[0]!r}, found {reader.fieldnames}")
    known = set(names)
    table: dict[str, Mapping[str, str]] = {}
    for row in rows:
        path = row[column] if row[column] in known else f"images/{row[column]}"
        if path not in known:
            raise SourceError(f"{where}: names {row[column]!r}, which is not below the folder; correct the table")
        table[path] = row
    return table


def _column_labels(
    rows: Mapping[str, Mapping[str, str]], names: Sequence[str], wanted: str | None, where: str
) -> tuple[list[int | None], list[str]]:
    """Labels from a column: class indices if all are whole numbers, else names."""
    if wanted is None and any(LABEL_COLUMN not in row for row in rows.values()):
        return [None] * len(names), []
    return text_labels(_column(rows, names, wanted or LABEL_COLUMN, where))


def _column(rows: Mapping[str, Mapping[str, str]], names: Sequence[str], column: str, where: str) -> list[str | None]:
    """Values of a column, by image; None for images that the table does not name."""
    found = next(iter(rows.values()), {})
    if column not in found:
        raise SourceError(f"{where}: expected a column {column!r}, found {list(found)}")
    return [rows[name][column] or None if name in rows else None for name in names]
