"""Union of the parts of one group in several artifacts.

Shapes: N members, pixels [C, H, W].
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from storage_schemas.schema.exact import exact_arrays, exact_moments
from storage_schemas.schema.manifest import Layout
from storage_schemas.schema.moments import ExactMoments
from storage_schemas.schema.record import Array, Record

# Arrays that all parts of a group have in common.
KEPT = ("target", "clean")


def unite(parts: Sequence[Record], layout: Layout) -> Record:
    """The union of the parts' members as one record in `layout`.

    Key, label, target and clean image are those of the first part. Sample names that several parts have are kept
    once. Values in `info` are averaged over all members.
    """
    count = sum(part.count for part in parts)
    # Other arrays of several parts, such as factors of the covariance, cannot be combined.
    kept = KEPT if len(parts) > 1 else parts[0].arrays.keys()
    arrays: dict[str, Array] = {name: parts[0].arrays[name] for name in kept if layout.array(name)}
    if layout.encoding == "uint8_moments":
        moments = functools.reduce(ExactMoments.combine, (exact_moments(part, "combine") for part in parts))
        arrays |= exact_arrays(moments, layout, parts[0].key)
    else:
        arrays |= _pooled(parts, count)
    spec = layout.array("members")
    if spec is not None:
        members = [part.members for part in parts if part.members is not None]
        padding = np.zeros((spec.shape[0] - count, *spec.shape[1:]), np.uint8)
        arrays["members"] = np.concatenate([*members, padding])
    shared = set.intersection(*(set(part.info) for part in parts))
    return Record(
        key=parts[0].key,
        count=count,
        encoding=layout.encoding,
        arrays={spec.name: arrays[spec.name] for spec in layout.arrays},
        label=parts[0].label,
        samples=tuple(dict.fromkeys(name for part in parts for name in part.samples)),
        info={
            name: sum(part.count * part.info[name] for part in parts) / count
            for name in parts[0].info
            if name in shared
        },
    )


def _pooled(parts: Sequence[Record], count: int) -> dict[str, Array]:
    """Mean and mean square of float32 parts, computed in float64 about the common mean (Chan et al., 1979)."""
    if len(parts) == 1:
        return {name: parts[0].arrays[name] for name in ("mean", "mean_square")}
    weights = [part.count / count for part in parts]
    means = [part.arrays["mean"].astype(np.float64) for part in parts]
    mean = sum(weight * one for weight, one in zip(weights, means, strict=True))
    variance = sum(
        weight * (np.maximum(part.arrays["mean_square"].astype(np.float64) - one * one, 0) + np.square(one - mean))
        for weight, part, one in zip(weights, parts, means, strict=True)
    )
    return {"mean": np.asarray(mean, np.float32), "mean_square": np.asarray(variance + mean * mean, np.float32)}
