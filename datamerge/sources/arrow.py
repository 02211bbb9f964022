"""Arrow IPC files, streams or with a footer, as `datasets.save_to_disk` and the cache of `datasets` write them.

data-00000-of-00002.arrow, …   tables; each split of a DatasetDict has a folder
state.json                     list of the files that belong to the data set
dataset_info.json              class names, if the tables do not hold them
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from datamerge.runtime.messages import first_line
from datamerge.sources.images import BadImage
from datamerge.sources.parquet import BROKEN, TableFile, open_tables
from datamerge.sources.sample import Columns, RawImage, Sample, Source
from datamerge.sources.tables import to_image
from storage_schemas import Location, SourceError, read_json

STATE, INFO = "state.json", "dataset_info.json"
HUGGING_FACE = b"huggingface"  # key of the features in the metadata


class ArrowReader:
    """Reads rows; keeps the last file open. Local files are memory-mapped."""

    is_concurrent = False
    # Files are fetched whole, so more threads would not help.
    is_remote = False

    def __init__(self, location: Location, column: str) -> None:
        self._location, self._column = location, column
        self._open: tuple[str, pa.ChunkedArray] | None = None
        self._broken: dict[str, str] = {}

    def read(self, sample: Sample) -> RawImage:
        name, _, row = sample.name.rpartition("#")
        try:
            value = self._column_of(name)[int(row)].as_py()
        except BROKEN as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # an error of the disk or network; pyarrow's errors about content have no errno
            raise BadImage(f"row {row} of {name} cannot be read: {first_line(error)}") from None
        return to_image(value, self._location, name, int(row))

    def _column_of(self, name: str) -> pa.ChunkedArray:
        """The column of images of a file. A broken file is read once, not once per row."""
        if name in self._broken:
            raise ValueError(self._broken[name])
        if self._open is None or self._open[0] != name:
            try:
                self._open = (name, read_table(self._location, name).column(self._column))
            except BROKEN as error:
                if not isinstance(error, OSError) or error.errno is None:
                    self._broken[name] = first_line(error)
                raise
        return self._open[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": None, "_broken": {}}


class _ArrowFile:
    """A table, with the features of its data set."""

    def __init__(self, table: pa.Table, info: Any) -> None:
        self._table = table
        self.metadata = SimpleNamespace(num_rows=table.num_rows)
        self._info = info

    @cached_property
    def schema_arrow(self) -> pa.Schema:
        schema: pa.Schema = self._table.schema
        if HUGGING_FACE in (schema.metadata or {}) or self._info is None:
            return schema
        return schema.with_metadata({HUGGING_FACE: json.dumps({"info": self._info}).encode()})

    @property
    def blocks(self) -> list[int]:
        """One block: files are opened or fetched as a whole."""
        return [self._table.num_rows]

    def read(self, columns: Sequence[str]) -> pa.Table:
        return self._table.select(list(columns))

    def paths(self, column: str) -> list[str | None] | None:
        values = self._table.column(column)
        if not pa.types.is_struct(values.type) or values.type.get_field_index("path") < 0:
            return None
        has_bytes = values.type.get_field_index("bytes") >= 0
        if has_bytes and pc.struct_field(values, "bytes").null_count < len(values):
            return None
        paths: list[str | None] = pc.struct_field(values, "path").to_pylist()
        return paths


def open_arrow(location: Location, files: Sequence[tuple[str, int]], columns: Columns) -> Source:
    """List the rows of Arrow files below a location.

    Raises:
        SourceError: a file is not an Arrow file, or lacks a column.
    """
    return open_tables(location, files, columns, "arrow", _opened, ArrowReader)


def read_table(location: Location, name: str) -> pa.Table:
    """Open a table; a local file is memory-mapped, a remote one fetched.

    Raises:
        pa.ArrowInvalid: the file is not an Arrow file, or is truncated.
    """
    path = location.local_path(name)
    source = pa.memory_map(path) if path is not None else pa.BufferReader(location.read(name))
    footer = source.read(6) == b"ARROW1"
    source.seek(0)
    with (pa.ipc.open_file if footer else pa.ipc.open_stream)(source) as reader:
        return reader.read_all()


def of_data_set(
    location: Location, files: Sequence[tuple[str, int]], others: Collection[str]
) -> list[tuple[str, int]]:
    """The files that belong to data sets, without the caches that `datasets` writes beside them.

    Args:
        location: location of the files.
        files: paths and sizes in bytes.
        others: paths of other files, such as state.json.
    """
    known: dict[str, set[str]] = {}
    for path in others:
        folder, _, name = path.rpartition("/")
        if name == STATE:
            known[folder] = _data_files(location, path)
    kept = []
    for file in files:
        folder, _, name = file[0].rpartition("/")
        if name in known.get(folder, {name}) and not name.startswith("cache-"):
            kept.append(file)
    return kept


def _data_files(location: Location, state: str) -> set[str]:
    try:
        return {str(entry["filename"]) for entry in read_json(location.read(state))["_data_files"]}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(
            f"{location.url}/{state}: expected the form that datasets.save_to_disk writes: {first_line(error)}"
        ) from None


def _opened(location: Location, name: str, size: int) -> TableFile:
    folder = name.rpartition("/")[0]
    info = f"{folder}/{INFO}" if folder else INFO
    found = None
    if not location.is_read_only and location.exists(info):
        try:
            found = read_json(location.read(info))
        except ValueError:
            found = None  # it only adds class names
    return _ArrowFile(read_table(location, name), found)
