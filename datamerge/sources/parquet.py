"""Parquet files with a column of encoded images, as Hugging Face datasets store them ({bytes, path}, or bytes)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from datamerge.runtime.messages import first_line
from datamerge.sources.coded import Coded
from datamerge.sources.columns import Samples
from datamerge.sources.images import BadImage
from datamerge.sources.naming import Rows
from datamerge.sources.sample import (
    Columns,
    RawImage,
    Reader,
    Sample,
    Source,
    fingerprint,
    make_keys,
    make_listing,
)
from datamerge.sources.table_labels import TableLabels
from datamerge.sources.tables import check_paths, has_images, image_column, to_image
from storage_schemas import Location, SourceError

# Exceptions of pyarrow for files that are invalid or truncated.
BROKEN = (pa.ArrowException, OSError, ValueError, LookupError, MemoryError)
_CALLED = {"parquet": "a Parquet", "arrow": "an Arrow"}


class TableFile(Protocol):
    """A file that holds one table."""

    metadata: Any  # has num_rows

    @property
    def schema_arrow(self) -> pa.Schema:
        """Names and types of the columns."""
        ...

    @property
    def blocks(self) -> list[int]:
        """Number of rows of each part that is read at once."""
        ...

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Read some columns."""
        ...

    def paths(self, column: str) -> list[str | None] | None:
        """The paths in a column {bytes, path} without any bytes; None if it holds images."""
        ...


class _ParquetFile(pq.ParquetFile):  # type: ignore[misc]  # pyarrow is untyped
    """A Parquet file."""

    @property
    def blocks(self) -> list[int]:
        return [self.metadata.row_group(group).num_rows for group in range(self.num_row_groups)]

    def paths(self, column: str) -> list[str | None] | None:
        kind = self.schema_arrow.field(column).type
        if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
            return None
        place = kind.get_field_index("bytes")
        if place >= 0 and not pa.types.is_null(kind[place].type) and not self._is_null(f"{column}.bytes"):
            return None
        return [value and value["path"] for value in self.read(columns=[f"{column}.path"]).column(column).to_pylist()]

    def _is_null(self, leaf: str) -> bool:
        """Whether the statistics, which may be missing, show that a column holds only nulls."""
        groups = [self.metadata.row_group(number) for number in range(self.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        counts = [(chunk.num_values, chunk.statistics) for chunk in chunks if chunk.path_in_schema == leaf]
        return bool(counts) and all(
            stats is not None and stats.has_null_count and stats.null_count == count for count, stats in counts
        )


class ParquetReader:
    """Reads rows; keeps the last row group in memory, because shards are runs of rows."""

    is_concurrent = False
    # Row groups are fetched whole, so more threads would not help.
    is_remote = False

    def __init__(self, location: Location, column: str) -> None:
        self._location = location
        self._column = column
        self._file: tuple[str, pq.ParquetFile] | None = None
        self._cached: tuple[str, int, Any] | None = None
        self._broken: dict[tuple[str, int], str] = {}

    def read(self, sample: Sample) -> RawImage:
        name, _, row = sample.name.rpartition("#")
        try:
            value = self._value(name, int(row))
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk or network; pyarrow's errors about content have no errno
            raise BadImage(f"row {row} of {name} cannot be read: {first_line(error)}") from None
        return to_image(value, self._location, name, int(row))

    def _value(self, name: str, row: int) -> Any:
        if self._file is None or self._file[0] != name:
            self._file = (name, pq.ParquetFile(self._location.open(name)))
        file, number = self._file[1], row
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                return self._column_of(name, file, group)[row].as_py()
            row -= rows
        raise LookupError(f"{name} has no row {number}")

    def _column_of(self, name: str, file: pq.ParquetFile, group: int) -> Any:
        """The column of images of a row group. A broken group is read once, not once per row."""
        if (name, group) in self._broken:
            raise ValueError(self._broken[name, group])
        if self._cached is None or self._cached[:2] != (name, group):
            try:
                table = file.read_row_group(group, columns=[self._column])
            except BROKEN as error:
                if not isinstance(error, OSError) or error.errno is None:
                    self._broken[name, group] = first_line(error)
                raise
            self._cached = (name, group, table.column(self._column))
        return self._cached[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_file": None, "_cached": None, "_broken": {}}


def open_parquet(
    location: Location,
    files: Sequence[tuple[str, int]],
    columns: Columns,
) -> Source:
    """List the rows of Parquet files below a location.

    Raises:
        SourceError: a file is not Parquet, or lacks a column.
    """
    return open_tables(location, files, columns, "parquet", _opened, ParquetReader)


def open_tables(
    location: Location,
    files: Sequence[tuple[str, int]],
    columns: Columns,
    kind: str,
    opened: Callable[[Location, str, int], TableFile],
    reader: Callable[[Location, str], Reader],
) -> Source:
    """List the rows of files with one table each.

    Args:
        location: location of the files.
        files: paths below the location, and sizes in bytes.
        columns: columns of the tables.
        kind: kind of the source.
        opened: opens a file; raises ValueError if it cannot have as many rows as it claims.
        reader: makes the reader of the image column.

    Raises:
        SourceError: a file is of another kind, lacks a column, or there are no rows.
    """
    beside: dict[str, int] = {}
    blocks: list[int] = []
    entries: list[tuple[str, int, int]] = []
    place = f"{location.url}/{files[0][0]}" if len(files) == 1 else location.url
    found = TableLabels(columns.label, place, [columns.group])
    groups = Coded()
    column = columns.image
    for name, size in files:
        where = f"{location.url}/{name}"
        try:
            file = opened(location, name, size)
            rows, schema = file.metadata.num_rows, file.schema_arrow
            column = image_column(schema, column, where)
            found.add(schema, rows, partial(_values, file), where, column)
            if columns.group is not None:
                groups.add_column(_group_values(file, columns.group, where), _as_group)
            if (paths := file.paths(column)) is not None:
                beside.update(check_paths(location, name, paths, where))
        except BROKEN as error:
            raise SourceError(f"{where}: expected {_CALLED[kind]} file: {first_line(error)}") from None
        blocks += file.blocks
        entries.append((name, size, rows))
    stored = [name for name, _, _ in entries]
    naming = Rows.of(stored, make_keys(stored), [rows for _, _, rows in entries])
    labels, names = found.finish(lambda index: naming.names(index, index + 1)[0])
    samples = Samples(naming, labels, None if columns.group is None else groups.values())
    if not len(samples) or column is None:
        without = "a file" if len(files) == 1 else f"{len(files)} files, such as {files[0][0]},"
        raise SourceError(f"{place}: expected rows with images, found {without} without rows")
    listing = make_listing(location, [*files, *beside.items()])
    identity = fingerprint([column, entries, listing, samples.json_of_labels(), samples.json_of_groups()])
    source = Source(location.url, kind, samples, names, identity, reader(location, column), listing, location)
    sizes = np.array([size for size in blocks if size], np.int64)
    return replace(source, unlabelled=found.unlabelled, blocks=sizes)


def holds_images(location: Location, name: str) -> bool:
    """Whether a Parquet file has a column that may hold images; True if unreadable, so that opening reports it."""
    try:
        return has_images(pq.ParquetFile(location.open(name)).schema_arrow)
    except BROKEN:
        return True


def _opened(location: Location, name: str, size: int) -> TableFile:
    file = _ParquetFile(location.open(name))
    _check_rows(file, size)
    return file


def _check_rows(file: _ParquetFile, size: int) -> None:
    """Raise ValueError if a file of `size` bytes cannot have as many rows as it claims.

    A footer of 200 bytes can claim any number of rows, and every listed row takes memory. An image takes more than a
    byte.
    """
    rows = int(file.metadata.num_rows)
    groups = file.blocks
    if not 0 <= rows <= size:
        raise ValueError(
            f"{size} bytes that claim {rows} rows, which is less than a byte an image; if most images are the same, "
            "write the file with no compression and no dictionary (pyarrow: compression=None, use_dictionary=False)"
        )
    if rows != sum(groups) or min(groups, default=0) < 0:
        raise ValueError(f"{rows} rows in row groups of {sum(groups)}")


def _group_values(file: TableFile, column: str, where: str) -> pa.ChunkedArray:
    """Values of the group column, one per row."""
    if column not in file.schema_arrow.names:
        raise SourceError(f"{where}: expected a group column {column!r}, found {file.schema_arrow.names}")
    return _values(file, column)


def _as_group(value: Any) -> str | None:
    return None if value is None else str(value)


def _values(file: TableFile, column: str) -> pa.ChunkedArray:
    """Values of a column, one per row."""
    rows = file.metadata.num_rows
    values = file.read(columns=[column]).column(column)
    if len(values) != rows:
        raise ValueError(f"column {column} holds {len(values)} values for {rows} rows")
    return values
