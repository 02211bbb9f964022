"""The logical record of a group, and the conversion between moments and stored arrays.

Both encodings give the same three quantities in [0, 1] pixel space, float32 [C, H, W]:

    encoding        stored              mean              mean_square          variance
    float32         mean, mean_square   as stored         as stored            max(mean_square − mean², 0)
    uint8_moments   sum S, scatter Q    S / 255N          (Q + S²) / (255N)²   Q / (255N)²

Rounding can leave mean_square of `float32` slightly below mean², so the variance is clipped at 0. The number of
clipped values is counted when a shard is written and stored in its commit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import google_crc32c
import numpy as np
import numpy.typing as npt

from storage_schemas.display import mean_and_variance, one_line, table
from storage_schemas.errors import shortened
from storage_schemas.schema.factors import decode_factors, factor_unit
from storage_schemas.schema.manifest import MOMENT_ARRAYS, ArraySpec, EncodingName, Layout
from storage_schemas.schema.moments import LEVELS, ExactMoments, scatter_dtype, sum_dtype

Array = npt.NDArray[np.generic]
Float32Array = npt.NDArray[np.float32]


class Quotient(NamedTuple):
    """Stored integers and their divisor; integers / divisor are values in [0, 1] pixel space."""

    integers: Array
    divisor: float

    def floats(self) -> Float32Array:
        """The quotients, float32."""
        return (self.integers.astype(np.float64) / self.divisor).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Record:
    """One group as it is stored.

    Attributes:
        key: identifier, unique in the artifact; no dots or slashes.
        count: number of members N.
        encoding: which moments `arrays` holds.
        arrays: stored arrays by name, see the module's table; optionally target float32 [K], members uint8
            [N, C, H, W], clean uint8 [C, H, W], factors integers [k, C, H, W]. After reading they are read-only
            views; the properties are copies.
        label: class index, if known.
        samples: names of the raw samples in the source.
        info: measured facts about the group, such as the attack's loss.
    """

    key: str
    count: int
    encoding: EncodingName
    arrays: Mapping[str, Array]
    label: int | None = None
    samples: tuple[str, ...] = ()
    info: Mapping[str, float] = field(default_factory=dict)

    def quotient(self, name: str) -> Quotient | None:
        """`mean`, `variance`, `factors`, `members` or `clean` as stored integers.

        Returns:
            The integers and their divisor; None if the quantity is not stored, or stored in float32.
        """
        if name in ("mean", "variance"):
            if self.encoding == "float32":
                return None
            unit = LEVELS * self.count
            return Quotient(self.arrays["sum"], unit) if name == "mean" else Quotient(self.arrays["scatter"], unit**2)
        stored = self.arrays.get(name)
        if stored is None:
            return None
        if name == "members":
            stored = stored[: self.count]
        return Quotient(stored, factor_unit(len(stored)) if name == "factors" else LEVELS)

    @property
    def mean(self) -> Float32Array:
        """Mean, float32 [C, H, W] in [0, 1]."""
        exact = self.quotient("mean")
        return self.arrays["mean"].astype(np.float32) if exact is None else exact.floats()

    @property
    def mean_square(self) -> Float32Array:
        """Mean square, float32 [C, H, W] in [0, 1]."""
        if self.encoding == "float32":
            return self.arrays["mean_square"].astype(np.float32)
        total = self.arrays["sum"].astype(np.float64)
        scatter = self.arrays["scatter"].astype(np.float64)
        return ((scatter + total * total) / (LEVELS * self.count) ** 2).astype(np.float32)

    @property
    def variance(self) -> Float32Array:
        """Variance (divisor N), float32 [C, H, W], never negative."""
        exact = self.quotient("variance")
        return np.maximum(_raw_variance(self), 0.0).astype(np.float32) if exact is None else exact.floats()

    @property
    def target(self) -> Float32Array | None:
        """Target embedding of training, float32 [K], if the artifact keeps it."""
        target = self.arrays.get("target")
        return None if target is None else target.astype(np.float32)

    @property
    def members(self) -> npt.NDArray[np.uint8] | None:
        """The members themselves, uint8 [N, C, H, W], if the artifact keeps them."""
        members = self.arrays.get("members")
        return None if members is None else members[: self.count].astype(np.uint8)

    @property
    def clean(self) -> npt.NDArray[np.uint8] | None:
        """The clean image an adversarial group was made from, uint8 [C, H, W], if the artifact keeps it."""
        clean = self.arrays.get("clean")
        return None if clean is None else clean.astype(np.uint8)

    @property
    def factors(self) -> Float32Array | None:
        """Factors F of the covariance, Σ_j F_j F_jᵀ ≈ C, float32 [k, C, H, W], if the artifact keeps them."""
        stored = self.arrays.get("factors")
        return None if stored is None else decode_factors(stored)

    def __repr__(self) -> str:
        label = () if self.label is None else (f"label {self.label}",)
        arrays = (f"{name} {list(array.shape)}" for name, array in self.arrays.items())
        return one_line(self, self.key, f"{self.count} members", *label, *arrays)

    def _repr_html_(self) -> str:
        """HTML for a notebook: facts, and the mean beside the variance as a heat map."""
        arrays = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in self.arrays.items())
        facts = {"members": self.count, "label": self.label, "samples": shortened(self.samples), **self.info}
        has_moments = self.arrays.keys() >= set(MOMENT_ARRAYS[self.encoding])
        picture = mean_and_variance(self.mean, self.variance) if has_moments else b""
        return table(self.key, {**facts, "arrays": arrays}, picture)

    def clipped_variances(self) -> int:
        """How many values of `variance` were raised to 0."""
        return int((_raw_variance(self) < 0).sum()) if self.encoding == "float32" else 0


def _raw_variance(record: Record) -> npt.NDArray[np.float64]:
    mean = record.arrays["mean"].astype(np.float64)
    return record.arrays["mean_square"].astype(np.float64) - mean * mean


def moment_specs(encoding: EncodingName, shape: tuple[int, ...], count: int, spread: int) -> list[ArraySpec]:
    """Specs of the two arrays of an encoding.

    Args:
        encoding: of the artifact.
        shape: [C, H, W] of the pixels.
        count: most members of a group.
        spread: largest difference of two members of a group, in grey levels.
    """
    dtypes = (
        (np.dtype(np.float32),) * 2 if encoding == "float32" else (sum_dtype(count), scatter_dtype(count, spread))
    )
    return [ArraySpec.of(name, dtype, shape) for name, dtype in zip(MOMENT_ARRAYS[encoding], dtypes, strict=True)]


def encode_exact(moments: ExactMoments, layout: Layout) -> dict[str, Array]:
    """Stored arrays of exact moments, in the layout's encoding and dtypes.

    Raises:
        OverflowError: the values need wider dtypes than the layout has (the group is larger than planned).
    """
    if layout.encoding == "float32":
        return {
            "mean": moments.mean.astype(np.float32),
            "mean_square": moments.mean_square.astype(np.float32),
        }
    encoded: dict[str, Array] = {}
    for name, values in (("sum", moments.sum), ("scatter", moments.scatter)):
        spec = layout.array(name)
        if spec is None or values.max() > np.iinfo(spec.dtype).max:
            raise OverflowError(f"{name}: {values.max()} does not fit the planned {spec}")
        encoded[name] = values.astype(spec.dtype)
    return encoded


def crc32c(data: npt.NDArray[np.uint8]) -> str:
    """crc32c of contiguous bytes, as 8 hex digits."""
    return f"{google_crc32c.value(data):08x}"


def checksum(array: Array, spec: ArraySpec) -> str:
    """crc32c of an array's little-endian C-order bytes."""
    return crc32c(np.ascontiguousarray(array, dtype=spec.little_endian).reshape(-1).view(np.uint8))


def checksums(arrays: Mapping[str, Array], layout: Layout) -> dict[str, str]:
    """`checksum` of every array of a record, by name; the same in every format."""
    return {spec.name: checksum(arrays[spec.name], spec) for spec in layout.arrays}
