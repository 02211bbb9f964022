"""Artifacts made from artifacts: exact moments back from stored arrays, and writing shard by shard."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from storage_schemas.artifact import Artifact
from storage_schemas.card.finish import finish
from storage_schemas.errors import DatamergeError, SchemaError, UserError
from storage_schemas.schema.manifest import HEAD, MOMENT_ARRAYS, ArraySpec, EncodingName, Layout, Manifest, Reject
from storage_schemas.schema.moments import LEVELS, ExactMoments, IntArray, scatter_dtype, sum_dtype
from storage_schemas.schema.record import Array, Record, encode_exact
from storage_schemas.writer import ArtifactWriter

Advance = Callable[[int], None]
"""Told after every shard how many groups it held."""


def write_shards(
    writer: ArtifactWriter,
    files: Mapping[str, bytes],
    make: Callable[[int], tuple[Sequence[Record], Sequence[Reject]]],
    advance: Advance,
) -> Manifest:
    """Commit every shard that is not committed yet, then finish the artifact with its card and pictures.

    Raises:
        DatamergeError: a record that the format does not allow.

    Args:
        writer: of the new artifact; an unfinished one of the same plan is continued.
        files: what belongs to no shard, such as the class head.
        make: records and rejects of a shard, by its number.
        advance: told about progress.
    """
    writer.begin(files)
    committed = writer.committed()
    for shard in range(writer.layout.shards):
        if shard not in committed:
            try:
                writer.commit(shard, *make(shard))
            except ValueError as error:  # a key that is there twice, a mean that is no number
                raise DatamergeError(f"{writer.location.url}, shard {shard}: {error}") from error
        first = shard * writer.layout.groups_per_shard
        advance(min(writer.layout.groups_per_shard, writer.layout.groups - first))
    return finish(writer)


def head_file(artifact: Artifact) -> dict[str, bytes]:
    """The class head as a file that belongs to no shard, if the artifact has one."""
    if artifact.head() is None:  # reads it, and checks its hash
        return {}
    return {HEAD: artifact.location.read(HEAD)}


def moment_specs(encoding: EncodingName, shape: tuple[int, ...], count: int, spread: int) -> list[ArraySpec]:
    """The two arrays of an encoding, for groups of up to `count` members that differ by up to `spread` levels."""
    dtypes = (
        (np.dtype(np.float32),) * 2 if encoding == "float32" else (sum_dtype(count), scatter_dtype(count, spread))
    )
    return [ArraySpec.of(name, dtype, shape) for name, dtype in zip(MOMENT_ARRAYS[encoding], dtypes, strict=True)]


def exact_arrays(moments: ExactMoments, layout: Layout, key: str) -> dict[str, Array]:
    """`encode_exact` of a group that was made elsewhere.

    Raises:
        DatamergeError: its members differ by more than the layout, made from the provenance, allows.
    """
    try:
        return encode_exact(moments, layout)
    except OverflowError as error:
        raise DatamergeError(
            f"group {key}: {error}; its members differ by more than attack.epsilon of the provenance allows, so the "
            "provenance is not that of these groups"
        ) from None


def pixel_spread(provenance: Mapping[str, Any]) -> int:
    """Largest possible difference of two members of a group, in grey levels: 2ε·255 for an attack, else 255.

    Raises:
        SchemaError: an ε that is no number.
    """
    attack = provenance.get("attack")
    epsilon = attack.get("epsilon") if isinstance(attack, Mapping) else None
    if not isinstance(epsilon, str):
        return LEVELS
    # Checked before `Fraction` works it out: a short 1e999999999 has a billion digits.
    if not re.fullmatch(r"\d{1,20}(\.\d{1,20}|/0*[1-9]\d{0,19})?", epsilon, re.ASCII):
        raise SchemaError(f"provenance: attack.epsilon: expected a fraction such as 2/255, found {epsilon[:40]!r}")
    return min(LEVELS, 2 * math.floor(Fraction(epsilon) * LEVELS))


def exact_moments(record: Record, where: str) -> ExactMoments:
    """Count, Σx and Σx² of a record, as integers.

    For `float32` they are recovered from kept members, else from the stored values, provided that those are
    what float32 makes of the moments of 8-bit members, and of no other ones.

    Args:
        where: the artifact, for messages.

    Raises:
        UserError: stored values that are off the 8-bit grid, or too coarse to tell which integers they were.
        DatamergeError: integers that no group of N members has.
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


def _float32(moments: ExactMoments) -> dict[str, Array]:
    return {"mean": moments.mean.astype(np.float32), "mean_square": moments.mean_square.astype(np.float32)}


def _from_float32(record: Record, at: str) -> ExactMoments:
    """The only integers whose moments round to the stored ones."""
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
            "--encoding uint8_moments, or keep the encoding float32"
        )
    return solution
