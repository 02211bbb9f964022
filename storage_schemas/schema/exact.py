"""Exact integer moments of 8-bit pixels, recovered from any encoding, and the largest spread of a group.

Unions, smaller groups and other encodings are computed from these integers, without rounding errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from storage_schemas.errors import DatamergeError, SchemaError, UserError
from storage_schemas.schema.manifest import Layout
from storage_schemas.schema.moments import LEVELS, ExactMoments, IntArray
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.record import Array, Record, encode_exact


def pixel_spread(provenance: Mapping[str, Any]) -> int:
    """Largest possible difference of two members of a group, in grey levels: 2ε·255 for an attack, else 255.

    Examples:
        >>> pixel_spread({"attack": {"epsilon": "2/255"}})
        4

    Raises:
        SchemaError: `attack.epsilon` is not a length in pixel space.
    """
    attack = provenance.get("attack")
    epsilon = attack.get("epsilon") if isinstance(attack, Mapping) else None
    if not isinstance(epsilon, str):
        return LEVELS
    try:
        length = PixelLength(epsilon)
    except ValueError as error:
        raise SchemaError(f"provenance: attack.epsilon: {error}") from None
    return min(LEVELS, 2 * math.floor(length * LEVELS))


def exact_moments(record: Record, where: str) -> ExactMoments:
    """Count, Σx and Σx² of a record, as integers.

    For `float32` they are recovered from the stored members, else from the stored values, provided that exactly one
    set of integers rounds to those values in float32.

    Args:
        record: in any encoding.
        where: the artifact, for messages.

    Raises:
        UserError: the stored values are off the 8-bit grid, or too coarse to determine the integers.
        DatamergeError: no group of N members has the stored integers.
    """
    at = f"{where}: record {record.key}"
    if record.encoding == "uint8_moments":
        total = record.arrays["sum"].astype(np.int64)
        squares, rest = np.divmod(record.arrays["scatter"].astype(np.int64) + total * total, record.count)
        if rest.any():
            raise DatamergeError(f"{at}: sum and scatter are not those of {record.count} 8-bit members")
        return ExactMoments(record.count, total, squares)
    if record.members is not None:
        moments = ExactMoments.of(record.members)
        if not all(np.array_equal(_float32(moments)[name], record.arrays[name]) for name in ("mean", "mean_square")):
            raise UserError(f"{at}: its moments are not those of its 8-bit members; keep the encoding float32")
        return moments
    return _from_float32(record, at)


def exact_arrays(moments: ExactMoments, layout: Layout, key: str) -> dict[str, Array]:
    """`encode_exact` for a group from an artifact whose provenance determined the dtypes of `layout`.

    Raises:
        DatamergeError: the members differ by more than the provenance allows.
    """
    try:
        return encode_exact(moments, layout)
    except OverflowError as error:
        raise DatamergeError(
            f"group {key}: {error}; its members differ by more than attack.epsilon of the provenance allows, so the "
            "provenance is not that of these groups"
        ) from None


def _float32(moments: ExactMoments) -> dict[str, Array]:
    return {"mean": moments.mean.astype(np.float32), "mean_square": moments.mean_square.astype(np.float32)}


def _from_float32(record: Record, at: str) -> ExactMoments:
    """The unique integers whose moments round to the stored ones."""
    total = _solve(record, "mean", LEVELS * record.count, (-1, 0, 1), None, at)
    # x² and x have the same parity, hence so have their sums.
    squares = _solve(record, "mean_square", LEVELS**2 * record.count, (-2, -1, 0, 1, 2), total, at)
    if (record.count * squares < total * total).any() or (squares > LEVELS * total).any():
        raise UserError(f"{at}: expected moments of 8-bit pixels, found others; keep the encoding float32")
    return ExactMoments(record.count, total, squares)


def _solve(record: Record, name: str, unit: int, around: Sequence[int], parity: IntArray | None, at: str) -> IntArray:
    """Integers n with float32(n / unit) equal to the stored values, which must be unique."""
    stored = record.arrays[name].astype(np.float32)
    nearest = np.rint(stored.astype(np.float64) * unit).astype(np.int64)
    solution = np.zeros_like(nearest)
    solutions = np.zeros(nearest.shape, np.int64)
    for step in around:
        candidate = nearest + step
        fits = (candidate / unit).astype(np.float32) == stored
        if parity is not None:
            fits &= (candidate - parity) % 2 == 0
        solution[fits] = candidate[fits]
        solutions += fits
    if (solutions == 0).any():
        value = float(stored[solutions == 0][0])
        raise UserError(
            f"{at}: expected a {name} of {record.count} pixels on the 8-bit grid, a multiple of 1/{unit}, found "
            f"{value!r}; uint8_moments would not be exact, keep the encoding float32"
        )
    if (solutions > 1).any():
        raise UserError(
            f"{at}: float32 is too coarse to tell the exact {name} of {record.count} members; merge again with "
            '`encoding="uint8_moments"`, or keep the encoding float32'
        )
    return solution
