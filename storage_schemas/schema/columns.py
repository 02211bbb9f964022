"""Many small documents of one model, stored by column.

A manifest may list hundreds of thousands of shards: one object per shard would take six times the memory, and seconds
to send to every process that reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar, get_args, overload

from pydantic import BaseModel, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

D = TypeVar("D", bound=BaseModel)
Row = tuple[Any, ...]


class Columns(Sequence[D], Generic[D]):
    """An immutable sequence of documents, which are built on access.

    As the type of a field, `Columns[Model]` parses, validates and serialises like `tuple[Model, ...]`.

    Args:
        model: class of the documents.
        documents: validated documents.
    """

    def __init__(self, model: type[D], documents: Iterable[D] = ()) -> None:
        self._fill(model, map(_row, documents))

    def _fill(self, model: type[D], rows: Iterable[Row]) -> None:
        self._model = model
        by_column = list(zip(*rows, strict=True)) or [()] * len(model.model_fields)
        self._columns: dict[str, Row] = dict(zip(model.model_fields, by_column, strict=True))

    def column(self, name: str) -> Row:
        """The values of one field."""
        return self._columns[name]

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    @overload
    def __getitem__(self, index: int) -> D: ...

    @overload
    def __getitem__(self, index: slice) -> Columns[D]: ...

    def __getitem__(self, index: int | slice) -> D | Columns[D]:
        if isinstance(index, slice):
            return Columns(self._model, (self[i] for i in range(*index.indices(len(self)))))
        return self._document([values[index] for values in self._columns.values()])

    def __iter__(self) -> Iterator[D]:
        return map(self._document, zip(*self._columns.values(), strict=True))

    def _document(self, row: Iterable[Any]) -> D:
        # The values were validated when the columns were filled.
        return self._model.model_construct(**dict(zip(self._columns, row, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Columns):
            return NotImplemented
        return (self._model, self._columns) == (other._model, other._columns)

    __hash__ = None  # type: ignore[assignment]  # compared by value

    def __repr__(self) -> str:
        return f"<{len(self)} of {self._model.__name__}>"

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        (model,) = get_args(source)

        def gathered(rows: Iterable[Row]) -> Columns[Any]:
            columns = cls(model)
            columns._fill(model, rows)
            return columns

        def kept(value: Any, validate: core_schema.ValidatorFunctionWrapHandler) -> Any:
            return value if isinstance(value, Columns) else validate(value)

        # Each document is freed before the next one is validated: keeping all would slow down garbage collection.
        rows = core_schema.no_info_after_validator_function(_row, handler.generate_schema(model))
        fresh = core_schema.no_info_after_validator_function(gathered, core_schema.tuple_variable_schema(rows))
        return core_schema.json_or_python_schema(
            fresh,
            core_schema.no_info_wrap_validator_function(kept, fresh),
            serialization=core_schema.plain_serializer_function_ser_schema(
                tuple, return_schema=core_schema.tuple_variable_schema(handler.generate_schema(model))
            ),
        )


def _row(document: BaseModel) -> Row:
    return tuple(document.__dict__.values())
