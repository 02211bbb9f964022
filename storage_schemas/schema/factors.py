"""Low-rank factors of a group's covariance, which the mean and the variance do not contain.

The deviations of adversarial members lie mostly along a few directions, so they are strongly correlated between
pixels. The variance, the diagonal of the covariance, contains none of this correlation. k images F_1 … F_k per group
approximate the full covariance:

    Σ_j F_j F_jᵀ ≈ C = 1/N Σ_i (x_i − x̄)(x_i − x̄)ᵀ

    kind         F_j                                                 Σ_j F_j F_jᵀ
    sketch       1/√(kN) Σ_i ξ_ji (x_i − x̄),  ξ_ji ∈ {−1, +1}        C in expectation over the signs ξ
    principal    √λ_j v_j, the k largest eigenpairs of C             best of rank k (Eckart and Young 1936)

With k ≥ N − 1 the principal directions reproduce C exactly, but a sketch does not: for a pair it is zero whenever
both signs agree. Therefore a sketch with k ≥ N − 1 stores the principal directions instead.

Stored as integers q_j = round(255·√k·F_j), so that F_j = q_j / (255·√k) for both kinds. For k = 1 the unit is one
grey level; √k keeps the relative rounding error the same when the covariance is spread over more factors.

Shapes: N members, k factors, C H W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from storage_schemas.schema.manifest import ArraySpec, Layout
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.seeds import group_seed

FactorKind = Literal["sketch", "principal"]
Members = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


def factors(members: Members, count: int, kind: FactorKind, generator: np.random.Generator) -> IntArray:
    """Stored factors q of a group, int64 [k, C, H, W].

    Args:
        members: 8-bit images [N, C, H, W].
        count: k; factors beyond N − 1 are zeros.
        kind: see the module's table; `sketch` with k ≥ N − 1 equals `principal`.
        generator: for the signs of a sketch.
    """
    total = members.astype(np.int64)
    centred = len(members) * total - total.sum(axis=0)  # N(x_i − x̄), exact
    if kind == "sketch" and count < len(members) - 1:
        return _sketch(centred, count, generator)
    return _principal(centred, count)


def sign_generator(seed: int, key: str) -> np.random.Generator:
    """Random generator for the signs of group `key`; depends on the seed and the key alone."""
    return np.random.default_rng(group_seed(seed, key))


def stored_factors(
    members: Members, layout: Layout, kind: FactorKind, seed: int, key: str
) -> npt.NDArray[np.generic]:
    """Factors of group `key` as its record stores them: k and dtype from the layout, signs from seed and key.

    Raises:
        ValueError: the layout has no factors.
    """
    spec = layout.array("factors")
    if spec is None:
        raise ValueError("the layout has no factors")
    return factors(members, spec.shape[0], kind, sign_generator(seed, key)).astype(spec.dtype)


def factor_spec(count: int, members: int, pixel_range: int, shape: tuple[int, ...]) -> ArraySpec:
    """Spec of the array of k = `count` factors, for N members that differ by at most `pixel_range` grey levels."""
    return ArraySpec.of("factors", factor_dtype(members, pixel_range), (count, *shape))


def factor_dtype(members: int, pixel_range: int) -> np.dtype[np.signedinteger]:
    """Smallest dtype for stored factors of N members that differ by at most `pixel_range` grey levels.

    |q| ≤ √N·range/2 for both kinds: the standard deviation of a pixel is at most range/2, and an entry of √k·F_j is
    at most √k standard deviations, where at most N factors are not zero.

    Raises:
        OverflowError: the factors need more than 32 bits.
    """
    bound = math.ceil(math.sqrt(members) * pixel_range / 2)
    for dtype in (np.int8, np.int16, np.int32):
        if bound <= np.iinfo(dtype).max:
            return np.dtype(dtype)
    raise OverflowError(f"factors of {members} members do not fit in 32 bits")


def decode_factors(stored: npt.NDArray[np.generic]) -> npt.NDArray[np.float32]:
    """F, float32 [k, C, H, W] in [0, 1] pixel units, from stored integers."""
    return (stored.astype(np.float64) / factor_unit(len(stored))).astype(np.float32)


def factor_unit(count: int) -> float:
    """Divisor of the stored integers of k = `count` factors: 255·√k."""
    return LEVELS * math.sqrt(count)


def sketch_signs(count: int, members: int, generator: np.random.Generator) -> IntArray:
    """Random signs ξ of a sketch, int64 [k, N]."""
    return 2 * generator.integers(0, 2, (count, members), np.int64) - 1


def principal_weights(gram: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
    """Weights of the members' deviations in the principal directions, float64 [min(k, N − 1), N].

    Args:
        gram: inner products of the images N(x_i − x̄), [N, N].
        count: k.
    """
    members = len(gram)
    vectors = np.linalg.eigh(gram / members**3).eigenvectors  # ascending
    rows = [vectors[:, -1 - j] for j in range(min(count, members - 1))]
    # √λ_j v_j = Σ_i w_i (x_i − x̄)/√N for a unit vector w; its sign is a convention.
    return np.array([w * (1.0 if w[np.argmax(np.abs(w))] > 0 else -1.0) for w in rows]).reshape(len(rows), members)


def _sketch(centred: IntArray, count: int, generator: np.random.Generator) -> IntArray:
    members = len(centred)
    signs = sketch_signs(count, members, generator)
    # The sums are exact; only the last division is rounded.
    sums = np.stack([sum((sign * image for sign, image in zip(row, centred, strict=True))) for row in signs.tolist()])
    scaled: npt.NDArray[np.float64] = sums / members**1.5
    return np.rint(scaled).astype(np.int64)


def _principal(centred: IntArray, count: int) -> IntArray:
    """Principal directions through the N×N Gram matrix, whose eigenvectors are their coordinates in the members."""
    members, shape = len(centred), centred.shape[1:]
    flat = centred.reshape(members, -1)
    gram = np.array([[int(np.dot(a, b)) for b in flat] for a in flat], np.float64)
    directions = np.zeros((count, *shape))
    for j, weights in enumerate(principal_weights(gram, count)):
        for weight, image in zip(weights.tolist(), centred, strict=True):
            directions[j] += weight * image
    scaled: npt.NDArray[np.float64] = directions * (math.sqrt(count) / members**1.5)
    return np.rint(scaled).astype(np.int64)
