"""One-hot labels: one column of 0 and 1 per class, such as `image,MEL,NV,BCC`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# In Python 1, 1.0 and True are the same key.
_BITS: dict[Any, int | None] = {None: None, 0: 0, 1: 1, "0": 0, "1": 1, "0.0": 0, "1.0": 1}
_NO_BIT = -1


@dataclass(frozen=True)
class OneHotColumns:
    """Columns that hold 0 and 1 only.

    Attributes:
        names: names of the columns, in order.
        labels: position of the 1 in each row; None for rows without exactly one 1.
        odd: indices of the rows with no 1, several ones, or some empty cells.
    """

    names: Sequence[str]
    labels: Sequence[int | None]
    odd: Sequence[int]


def find_one_hot(columns: Mapping[str, Sequence[Any]]) -> OneHotColumns | None:
    """The columns that hold only 0 and 1; None if there are fewer than two.

    Args:
        columns: values by column, one per row, as text or numbers; None for empty cells.
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
