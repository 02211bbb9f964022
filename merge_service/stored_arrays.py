"""Stored arrays of attacked groups, computed on the device that holds the pixels, bit for bit as NumPy computes them.

Sums, scatter and sketches are integers that their dtypes represent exactly, in any order of addition; quotients are
rounded once, in float64. So GPUs and CPUs agree with `ExactMoments` and `storage_schemas.schema.factors` to the last
bit, and a GPU transfers a sixth of the bytes of the members' float32 pixels.

Shapes: G groups of a batch, N members, k factors, C H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamerge.attacks import quotient
from storage_schemas import Layout
from storage_schemas.schema.factors import FactorKind, factors, principal_weights, sketch_signs
from storage_schemas.schema.moments import LEVELS


def grid_levels(pixels: Tensor) -> Tensor:
    """uint8 levels of pixels in [0, 1] that are multiples of 1/255 up to rounding error."""
    levels: Tensor = (pixels * LEVELS).round_()
    return levels.to(torch.uint8)


def exact_sums(members: Tensor) -> tuple[Tensor, Tensor]:
    """Σx and Σx² of uint8 members [G, N, C, H, W]: integers [G, C, H, W], wide enough for N·Σx²."""
    wide = torch.int32 if (members.shape[1] * LEVELS) ** 2 <= torch.iinfo(torch.int32).max else torch.int64
    total, squares = (torch.zeros_like(members[:, 0], dtype=wide) for _ in range(2))
    for member in members.unbind(1):
        values = member.to(wide)
        total += values
        squares += values * values
    return total, squares


def moment_arrays(members: Tensor, layout: Layout) -> dict[str, Tensor]:
    """`encode_exact` for every group of the members uint8 [G, N, C, H, W], on their device.

    Raises:
        OverflowError: a value does not fit the dtype of the layout.
    """
    count = members.shape[1]
    total, squares = exact_sums(members)
    if layout.encoding == "float32":
        mean, mean_square = quotient(total.double(), LEVELS * count), quotient(squares.double(), LEVELS**2 * count)
        return {"mean": mean.float(), "mean_square": mean_square.float()}
    encoded = {}
    for name, values in (("sum", total), ("scatter", count * squares - total * total)):
        spec, largest = layout.array(name), int(values.max())
        if spec is None or largest > np.iinfo(spec.dtype).max:
            raise OverflowError(f"{name}: {largest} does not fit the planned {spec}")
        encoded[name] = values.to(getattr(torch, spec.dtype))
    return encoded


def image_arrays(image: npt.NDArray[np.uint8], layout: Layout) -> dict[str, npt.NDArray[Any]]:
    """`encode_exact` for a group of one image [C, H, W]."""
    if layout.encoding == "float32":
        levels = np.arange(LEVELS + 1, dtype=np.float64)
        means, squares = levels / LEVELS, levels**2 / LEVELS**2
        return {"mean": means.astype(np.float32)[image], "mean_square": squares.astype(np.float32)[image]}
    dtypes = {spec.name: spec.dtype for spec in layout.arrays}
    return {"sum": image.astype(dtypes["sum"]), "scatter": np.zeros(image.shape, dtypes["scatter"])}


def factor_array(members: Tensor, count: int, kind: FactorKind, generators: Sequence[np.random.Generator]) -> Tensor:
    """`factors` for every group of members [G, N, C, H, W], on their device: int64 [G, k, C, H, W].

    Args:
        members: members, uint8.
        count: number of factors, k.
        kind: see `factors`.
        generators: generators of the signs, one per group.
    """
    number, flat = members.shape[1], members.flatten(2)
    if kind == "sketch" and count < number - 1:
        found = _sketches(flat, count, generators)
    elif flat.shape[2] * (number * LEVELS) ** 2 < 2**53:
        found = torch.stack([_principal(group, count) for group in flat])
    else:  # the products of two members need more than float64's 53 bits
        groups = zip(flat.cpu().numpy(), generators, strict=True)
        found = torch.from_numpy(np.stack([factors(group, count, kind, one) for group, one in groups]))
    stored: Tensor = found.unflatten(2, members.shape[2:])
    return stored


def _sketches(members: Tensor, count: int, generators: Sequence[np.random.Generator]) -> Tensor:
    """Sketches, uint8 [G, N, P] → int64 [G, k, P]: Σ ξ·N(x − x̄) = N·Σ ξx − Σξ·Σx, with random signs ξ."""
    number = members.shape[1]
    # Σ ξx is exact in float32 and TF32: 8-bit numbers times signs, with sums below 2²⁴.
    wide = torch.float32 if number * LEVELS < 2**24 else torch.float64
    signs = torch.from_numpy(np.stack([sketch_signs(count, number, generator) for generator in generators]))
    signs = torch.cat([signs, torch.ones_like(signs[:, :1])], dim=1).to(members.device)
    sums = torch.bmm(signs.to(wide), members.to(wide)).double()
    signed, total = sums[:, :-1], sums[:, -1:]
    centred = number * signed - signs[:, :-1].sum(dim=2, keepdim=True) * total
    return quotient(centred, number**1.5).round_().to(torch.int64)


def _principal(members: Tensor, count: int) -> Tensor:
    """Principal directions, uint8 [N, P] → int64 [k, P]; terms are added in the order of the members."""
    number = len(members)
    values = members.double()
    centred = number * values - values.sum(dim=0)
    weights = principal_weights((centred @ centred.T).cpu().numpy(), count)
    columns = torch.from_numpy(weights).to(members.device).unsqueeze(2).unbind(1)
    directions = torch.zeros((count, members.shape[1]), dtype=torch.float64, device=members.device)
    for column, image in zip(columns, centred, strict=True):
        directions[: len(column)] += column * image
    scaled: Tensor = directions * (math.sqrt(count) / number**1.5)
    return scaled.round_().to(torch.int64)


def on_host(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors to the CPU. From a GPU all go through pinned memory at once, and the calling thread waits."""
    if all(tensor.device.type == "cpu" for tensor in tensors.values()):
        return tensors
    pinned = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        for name, tensor in tensors.items()
    }
    torch.cuda.current_stream().synchronize()
    # Pinned memory is scarce: copy the results out, so that it is freed before they are written.
    return {name: tensor.clone() for name, tensor in pinned.items()}
