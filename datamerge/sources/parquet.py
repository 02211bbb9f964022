"""Parquet files with a column of encoded images, as Hugging Face datasets store them ({bytes, path}, or bytes)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from datamerge.runtime.messages import first_line
from datamerge.sources.images import BadImage
from datamerge.sources.labels import label_columns
from datamerge.sources.sample import (
    Columns,
    Sample,
    Source,
    fingerprint,
    make_keys,
    make_listing,
)
from datamerge.sources.table_labels import TableLabels
from storage_schemas import Location, SourceError

# What pyarrow raises for a file that is none, or not whole.
_BROKEN = (pa.ArrowException, OSError, ValueError, LookupError, MemoryError)


class ParquetReader:
    """Reads rows; keeps the last row group in memory, because shards are runs of rows."""

    is_concurrent = False
    # Row groups are fetched whole: more threads would not help.
    is_remote = False

    def __init__(self, location: Location, column: str) -> None:
        self._location = location
        self._column = column
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._cached: tuple[str, int, Any] | None = None

    def read(self, sample: Sample) -> bytes:
        name, _, row = sample.name.rpartition("#")
        try:
            value = self._value(name, int(row))
        except (pa.ArrowException, ValueError, LookupError) as error:
            # Not OSError, after which a merge waits and tries again, for every row.
            raise BadImage(f"row {row} of {name} cannot be read: {first_line(error)}") from None
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise BadImage(f"row {row} of {name}: the image column holds no bytes")
        return data

    def _value(self, name: str, row: int) -> Any:
        if self._file is None or self._file[0] != name:
            self._file = (name, pq.ParquetFile(self._location.open(name)))
        file, wanted = self._file[1], row
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                if self._cached is None or self._cached[:2] != (name, group):
                    table = file.read_row_group(group, columns=[self._column])
                    self._cached = (name, group, table.column(self._column))
                return self._cached[2][row].as_py()
            row -= rows
        raise OSError(f"{name} has no row {wanted}")

    def __getstate__(self) -> dict[str, Any]:
        return {"_location": self._location, "_column": self._column, "_file": None, "_cached": None}


def open_parquet(
    location: Location,
    files: Sequence[tuple[str, int]],
    columns: Columns,
) -> Source:
    """List the rows of Parquet files below a location.

    Raises:
        SourceError: a file is not Parquet, or has no such columns.
    """
    places: list[tuple[str, str]] = []
    entries: list[tuple[str, int, int]] = []
    place = f"{location.url}/{files[0][0]}" if len(files) == 1 else location.url
    found = TableLabels(columns.label, place, [columns.group])
    groups: list[str | None] = []
    column = columns.image
    for (name, size), stem in zip(files, make_keys([name for name, _ in files]), strict=True):
        where = f"{location.url}/{name}"
        try:
            file = pq.ParquetFile(location.open(name))
            rows = _count(file, size)
            schema = file.schema_arrow
            column = _image_column(schema, column, where)
            found.add(schema, rows, partial(_values, file), where, column)
            groups += _group_values(file, columns.group, where)
        except _BROKEN as error:
            raise SourceError(f"{where}: expected a Parquet file: {first_line(error)}") from None
        places += [(f"{stem}-{row:08d}", f"{name}#{row}") for row in range(rows)]
        entries.append((name, size, rows))
    labels, names = found.finish(lambda index: places[index][1])
    samples = [Sample(*row, label, group) for row, label, group in zip(places, labels, groups, strict=True)]
    if not samples or column is None:
        raise SourceError(f"{location.url}: expected rows with images, found empty Parquet files")
    listing = make_listing(location, files)
    identity = fingerprint([column, entries, listing, labels, groups])
    reader = ParquetReader(location, column)
    return Source(location.url, "parquet", samples, names, identity, reader, listing, location, found.unlabelled)


def _count(file: pq.ParquetFile, size: int) -> int:
    """Rows of a file of `size` bytes; raises ValueError where it cannot have that many.

    A footer of 200 bytes may claim any number, and we keep something of every row. No image fits into one byte.
    """
    rows = int(file.metadata.num_rows)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if not 0 <= rows <= size:
        raise ValueError(f"{size} bytes that claim {rows} rows")
    if rows != sum(groups) or min(groups, default=0) < 0:
        raise ValueError(f"{rows} rows in row groups of {sum(groups)}")
    return rows


def _group_values(file: pq.ParquetFile, column: str | None, where: str) -> list[str | None]:
    """Values of the group column as text, a value a row."""
    if column is not None and column not in file.schema_arrow.names:
        raise SourceError(f"{where}: expected a group column {column!r}, found {file.schema_arrow.names}")
    return [None if value is None else str(value) for value in _values(file, column)]


def _values(file: pq.ParquetFile, column: str | None) -> list[Any]:
    """A value a row; None of each where no column is meant."""
    rows = file.metadata.num_rows
    if column is None:
        return [None] * rows
    values: list[Any] = file.read(columns=[column]).column(column).to_pylist()
    if len(values) != rows:
        raise ValueError(f"column {column} holds {len(values)} values for {rows} rows")
    return values


def _image_column(schema: pa.Schema, wanted: str | None, where: str) -> str:
    candidates = [
        field.name
        for field in schema
        if pa.types.is_binary(field.type)
        or pa.types.is_large_binary(field.type)
        or (pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0)
    ]
    if wanted is None and len(candidates) > 1:  # labels may be bytes, too
        candidates = [name for name in candidates if not any(label_columns([name]))] or candidates
    if wanted is None and len(candidates) == 1:
        return str(candidates[0])
    if wanted in candidates:
        return str(wanted)
    asked = f"the image column {wanted!r}" if wanted else "one image column"
    raise SourceError(f"{where}: expected {asked}, found {candidates or schema.names}; name it with `image_column`")
