"""Dictionary encoding of a column of any values: the distinct values, and a code per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.sources.columns import NO_LABEL, Values
from datamerge.sources.labels import hashable, read_distinct


class Coded:
    """Collects a column of M values, file by file."""

    def __init__(self) -> None:
        self._places: dict[Any, int] = {}
        self._codes: list[npt.NDArray[np.int32]] = []

    def __len__(self) -> int:
        return sum(map(len, self._codes))

    def add(self, values: Iterable[Any]) -> None:
        """Add Python values.

        Raises:
            NoClass: a value cannot be a label.
        """
        places = self._places
        codes = [places.setdefault(hashable(value), len(places)) for value in values]
        self._codes.append(np.array(codes, np.int32))

    def add_coded(self, distinct: Sequence[Any], codes: npt.NDArray[np.integer[Any]]) -> None:
        """Add values by their codes in `distinct`, which may hold unused or repeated values."""
        places = self._places
        table = [places.setdefault(hashable(value), len(places)) for value in distinct]
        self._codes.append(np.array(table, np.int32)[codes])

    def add_column(self, column: pa.ChunkedArray, to_value: Callable[[Any], Any] = lambda value: value) -> None:
        """Add Arrow values, each converted to Python and then by `to_value`."""
        try:
            encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):  # lists, views
            self.add(to_value(value) for value in column.to_pylist())
            return
        for chunk in encoded.chunks:
            distinct = [*map(to_value, chunk.dictionary.to_pylist()), None]
            self.add_coded(distinct, chunk.indices.fill_null(len(distinct) - 1).to_numpy())

    def labels(
        self, where: str, names: Sequence[str], row: Callable[[int], str], folders: bool = False
    ) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Labels int32 [M] and class names; arguments and errors are those of `read_distinct`."""
        codes = self._joined()
        counts = np.bincount(codes, minlength=len(self._places))
        positions = np.zeros(len(counts), np.int64)
        positions[codes[::-1]] = np.arange(
            len(codes) - 1, -1, -1, dtype=np.int32
        )  # the last assignment wins: the first row
        keys = list(self._places)
        used = sorted(np.flatnonzero(counts).tolist(), key=positions.__getitem__)
        first = {keys[code]: int(positions[code]) for code in used}
        times = {keys[code]: int(counts[code]) for code in used}
        indices, names = read_distinct(first, times, where, names, row, folders)
        return np.array([indices.get(key, NO_LABEL) for key in keys], np.int32)[codes], names

    def values(self) -> Values:
        """The column, whose values are texts or None."""
        codes, distinct = self._joined(), list(self._places)
        if None in self._places:
            codes = np.where(codes == self._places[None], np.int32(-1), codes)
        return Values(["" if value is None else value for value in distinct], codes)

    def _joined(self) -> npt.NDArray[np.int32]:
        self._codes = [np.concatenate(self._codes or [np.empty(0, np.int32)])]
        return self._codes[0]
