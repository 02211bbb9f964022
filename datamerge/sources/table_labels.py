"""Finds the column of labels in a table of several files, and reads its labels and class names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datamerge.runtime.messages import say, warn
from datamerge.sources.coded import Coded
from datamerge.sources.columns import NO_LABEL
from datamerge.sources.labels import (
    NoClass,
    choose_column,
    label_columns,
    meaning,
    named_column,
    read_labels,
    shown,
    warn_of_twins,
)
from datamerge.sources.one_hot import OneHotColumns, find_one_hot
from datamerge.sources.sample import as_text
from datamerge.sources.splits import is_split_column, warn_of_split_column
from storage_schemas import SourceError, read_json, shortened

Read = Callable[[str], pa.ChunkedArray]
"""Gives the values of a column, one per row."""
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
_NUMBERS_AND_TEXT = (pa.types.is_integer, pa.types.is_boolean, *_TEXT, pa.types.is_null)
_BITS = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating)
_OTHERS = (
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


class TableLabels:
    """Collects the labels of a table, file by file.

    Args:
        named: the column that the user named, if any.
        where: URL of the table, for messages.
        left_out: columns that hold something else.
    """

    def __init__(self, named: str | None, where: str, left_out: Sequence[str | None] = ()) -> None:
        self._named, self._where = named, where
        self._left_out = {name for name in left_out if name is not None}
        self._column: str | None = None
        self._names: list[str] = []
        self._one_hot: list[str] = []  # one-hot columns; the first stands for all as `_column`
        self._files = self._rows = 0
        self._without: list[str] = []
        self._raw = Coded()
        self._splits: dict[str, Counter[str]] = {}
        self.unlabelled = ""

    def add(self, schema: pa.Schema, rows: int, read: Read, where: str, image: str) -> None:
        """Read the labels of one file, whose images are in the column `image`.

        Raises:
            SourceError: there is no such column, or it holds no labels.
        """
        self._files += 1
        self._rows += rows
        for name in schema.names:
            if is_split_column(name) and name not in self._left_out and _is_one_of(schema.field(name).type, _TEXT):
                self._splits.setdefault(name, Counter()).update(
                    value for value in read(name).to_pylist() if value is not None
                )
        if self._files == 1:
            self._left_out.add(image)
            self._column = self._choose(schema, read, where)
        if self._column is None:
            return
        if self._column not in schema.names:
            self._without.append(where)
            self._raw.add([None] * rows)
            return
        names = self._one_hot or class_names(schema, self._column)
        if names and self._names and names != self._names:
            raise SourceError(
                f"{where}: expected the classes of the files before it in {self._column!r}, "
                f"{shown(map(repr, self._names))}, found {shown(map(repr, names))}; give them one order"
            )
        self._names = self._names or names
        try:
            if self._is_plain(schema):
                self._raw.add_column(read(self._column))
            else:
                self._raw.add(self._values(schema, self._column, read))
        except NoClass as error:
            self._give_up(self._column, error, where)

    def finish(self, row: Callable[[int], str]) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Labels of all rows, int32 [M], and class names.

        Args:
            row: names a row from its position, for messages.

        Raises:
            SourceError: values are no labels.
        """
        for name, counts in self._splits.items():
            if name != self._column:
                warn_of_split_column(name, counts, self._where)
        if self._column is not None:
            try:
                labels, names = self._raw.labels(f"{self._where}, {self._column!r}", self._names, row)
            except NoClass as error:
                self._give_up(self._column, error, self._where)
            else:
                if self._without:
                    warn(
                        f"{self._where}: {len(self._without)} of {self._files} files have no column "
                        f"{self._column!r}, such as {self._without[0]}; their rows have no label"
                    )
                warn_of_twins(names, self._where)
                return labels, names
        return np.full(self._rows, NO_LABEL, np.int32), []

    def _choose(self, schema: pa.Schema, read: Read, where: str) -> str | None:
        """The column of labels; prints the choice if it is not obvious."""
        if self._named is not None:
            column = named_column(self._named, schema.names, where)
            if column is not None and not _may_hold_labels(schema.field(column).type):
                self._refuse(column, schema.field(column).type, where)
            if column is not None and not any(label_columns([column])):
                self._warn_of_one_of_several(column, schema, read, where)
            return column
        fitting = [
            field.name for field in schema if _may_hold_labels(field.type) and field.name not in self._left_out
        ]
        for name in [name for kind in label_columns(fitting) for name in kind]:
            if any(is_list(schema.field(name).type) for is_list in _LISTS):
                try:  # a list may be one-hot, hold one label, or hold several
                    read_labels(self._values(schema, name, read), where)
                except NoClass as error:
                    say(f"{where}: the column {name!r} holds no labels of one class: {error}")
                    fitting.remove(name)
        column, why = choose_column(fitting, where)
        if column is None and not why:
            column, why = self._choose_one_hot(schema, fitting, read, where)
        if column is None and not why:
            column, why = _by_type(schema, fitting, self._left_out, where)
        self.unlabelled = why
        return column

    def _choose_one_hot(
        self, schema: pa.Schema, fitting: Sequence[str], read: Read, where: str
    ) -> tuple[str | None, str]:
        """The first of the one-hot columns, or the reason why they are not one-hot."""
        hot = find_one_hot(_lists(read, [name for name in fitting if _is_one_of(schema.field(name).type, _BITS)]))
        if hot is None or any(class_names(schema, name) for name in fitting):
            return None, ""
        if hot.odd:
            rest = [name for name in _likely(schema, fitting) if name not in hot.names]
            why = "; ".join([_not_one_hot(hot), *([_none_called_label(rest)] if rest else [])])
            say(f"{where}: no labels are read: {why}")
            return None, why
        self._one_hot = list(hot.names)
        say(f"{where}: the columns {shown(hot.names)} hold one 1 a row, taken as {len(hot.names)} classes")
        return self._one_hot[0], ""

    def _warn_of_one_of_several(self, column: str, schema: pa.Schema, read: Read, where: str) -> None:
        """Warn if the chosen column is one of several one-hot columns: it tells only one class from the rest."""
        names = [field.name for field in schema if field.name not in self._left_out and _is_one_of(field.type, _BITS)]
        if column not in names or not set(read(column).to_pylist()) <= {0, 1}:
            return
        hot = find_one_hot(_lists(read, names))
        if hot is not None:
            warn(
                f"{where}: {column!r} is one of {len(hot.names)} columns of 0 and 1, {shown(hot.names)}; the labels "
                "are its 0 and 1 alone"
            )

    def _values(self, schema: pa.Schema, column: str, read: Read) -> list[Any]:
        if self._one_hot:
            if missing := [name for name in self._one_hot if name not in schema.names]:
                raise NoClass(f"no columns {shown(missing)} beside it")
            values = _lists(read, self._one_hot)
            hot = find_one_hot(values)
            if values[column] and (hot is None or hot.odd or hot.names != self._one_hot):
                raise NoClass(_not_one_hot(hot) if hot and hot.odd else "no 0 and 1 in columns beside it")
            return [] if hot is None else list(hot.labels)
        # Interpret at once: a one-hot row of a thousand numbers becomes one value.
        return [meaning(value) for value in read(column).to_pylist()]

    def _is_plain(self, schema: pa.Schema) -> bool:
        """Whether each label is a single value."""
        return not self._one_hot and not any(check(schema.field(self._column).type) for check in _LISTS)

    def _give_up(self, column: str, error: NoClass, where: str) -> None:
        """Ignore a column that only has a usual name of labels; refuse one that the user named."""
        if self._named is not None:
            self._refuse(column, error, where)
        self.unlabelled = f"the column {column!r} holds no labels of one class: {error}"
        warn(f"{where}: no labels are read: {self.unlabelled}")
        self._column = None

    def _refuse(self, column: str, found: object, where: str) -> None:
        raise SourceError(
            f"{where}: expected integers or text in the label column {column!r}, found {found}; use another "
            "`label_column`"
        ) from None


def _by_type(
    schema: pa.Schema, fitting: Sequence[str], left_out: Collection[str], where: str
) -> tuple[str | None, str]:
    """The only column with a ClassLabel feature of Hugging Face, or the reason why there is none."""
    classes = [name for name in fitting if class_names(schema, name)]
    if len(classes) == 1:
        say(f"{where}: labels are taken from {classes[0]!r}, the only column with class names")
        return classes[0], ""
    called = [name for names in label_columns(schema.names, left_out) for name in names]
    if odd := [name for name in called if not _may_hold_labels(schema.field(name).type)]:
        why = f"the column {odd[0]!r} holds no labels of one class: {shortened(str(schema.field(odd[0]).type))}"
        warn(f"{where}: no labels are read: {why}")
        return None, why
    likely = _likely(schema, fitting)
    if not likely:
        return None, ""
    why = _none_called_label(likely)
    say(f"{where}: no labels are read: {why}")
    return None, why


def _lists(read: Read, columns: Sequence[str]) -> dict[str, list[Any]]:
    return {name: read(name).to_pylist() for name in columns}


def _likely(schema: pa.Schema, names: Sequence[str]) -> list[str]:
    return [name for name in names if _is_one_of(schema.field(name).type, _NUMBERS_AND_TEXT)]


def _none_called_label(names: Sequence[str]) -> str:
    return f"none of the columns {shown(names)} is called label; name one as `label_column`"


def _not_one_hot(hot: OneHotColumns) -> str:
    return (
        f"the columns {shown(hot.names)} hold 0 and 1, but not one 1 each in {len(hot.odd)} of {len(hot.labels)} "
        f"rows, first row {hot.odd[0]}, so they give no single label"
    )


def _may_hold_labels(kind: pa.DataType) -> bool:
    if _is_one_of(kind, _LISTS):
        kind = kind.value_type
    return _is_one_of(kind, (*_NUMBERS_AND_TEXT, *_OTHERS))


def _is_one_of(kind: pa.DataType, checks: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return any(check(kind) for check in checks)


def class_names(schema: pa.Schema, column: str) -> list[str]:
    """Class names of a column, which Hugging Face datasets store in the metadata of the schema."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    if not metadata:
        return []
    try:
        feature = read_json(metadata)["info"]["features"][column]
        names = feature.get("feature", feature)["names"]  # a list of labels has an inner feature
        if isinstance(names, dict):  # {"0": "cat", …}, the form of dataset cards
            names = [names[key] for key in sorted(names, key=int)]
        return [as_text(name) for name in names]
    except (ValueError, KeyError, TypeError, AttributeError):  # other metadata under this key
        return []
