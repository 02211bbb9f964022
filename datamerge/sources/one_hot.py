"""Classes as columns of 0 and 1, one a class: `image,MEL,NV,BCC`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Numbers and booleans of Python that are equal are one key.
_BITS: dict[Any, int | None] = {None: None, 0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
_NO_BIT = -1


@dataclass(frozen=True)
class OneHotColumns:
    """Columns that hold 0 and 1 only.

    Attributes:
        names: of the columns, in their order.
        labels: place of the 1 among them, a value a row; None for rows that say nothing.
        odd: positions of the rows with no 1, several ones, or cells left empty.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    odd: Sequence[int]


def find_one_hot(columns: Mapping[str, Sequence[Any]]) -> OneHotColumns | None:
    """The columns of 0 and 1 among some; None where there are fewer than two.

    Args:
        columns: their values, one a row, as text or numbers; None for empty cells.
    """
    bits = {name: [_BITS.get(value, _NO_BIT) for value in values] for name, values in columns.items()}
    bits = {name: values for name, values in bits.items() if _NO_BIT not in values and {0, 1} & set(values)}
    if len(bits) < 2:
        return None
    labels: list[int | None] = []
    odd = []
    for position, row in enumerate(zip(*bits.values(), strict=True)):
        fits = row.count(1) == 1 and None not in row
        labels.append(row.index(1) if fits else None)
        if not fits and row.count(None) < len(row):
            odd.append(position)
    return OneHotColumns(list(bits), labels, odd)
