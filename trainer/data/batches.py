"""Batches: records as tensors, with pixels in [0, 1].

Stored integers are copied as they are, in a half or a quarter of the bytes of float32; on the device `Batch.floats`
converts them, with results equal to the last bit to those of `Record`.

Shapes: B groups, M images of all groups of a batch, k factors, C H W pixels, K embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from storage_schemas import Record
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Array, Quotient

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups of one step; each arm trains on one of the subclasses below.

    Attributes:
        keys: record keys.
        target: embeddings float32 [B, K] or labels int64 [B], whichever the loss takes.
        clean: clean images of the groups, float32 [B, C, H, W]; None if the run does not need them.
        divisors: by name of each attribute that still holds integers, its divisors: one per row, in the dtype in
            which to divide.
    """

    keys: list[str]
    target: Tensor
    clean: Tensor | None = None
    divisors: dict[str, Tensor] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """All attributes except `divisors`, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "divisors"}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> Self:
        """The same batch on a device; integers stay integers."""
        # Apple's GPUs have no float64.
        batch = self.floats() if device.type == "mps" else self
        return batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; the loader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def floats(self) -> Self:
        """The same batch with integers divided and converted to float32, without waiting for the device."""
        made = {name: _quotient(getattr(self, name), divisor) for name, divisor in self.divisors.items()}
        return self._with(divisors={}, **made)

    def first(self, count: int) -> Self:
        """The first `count` groups; the batch must come from `floats`."""
        return self._each(lambda tensor: tensor[:count])._with(keys=self.keys[:count])

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, divisors included."""
        return [*self._own().values(), *self.divisors.values()]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        divisors = {name: change(tensor) for name, tensor in self.divisors.items()}
        return self._with(divisors=divisors, **{name: change(tensor) for name, tensor in self._own().items()})

    def _with(self, **changed: Any) -> Self:
        return replace(self, **changed)

    def _own(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.content().items() if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True)
class MomentBatch(Batch):
    """Merged groups.

    Attributes:
        mean: float32 [B, C, H, W].
        variance: float32 [B, C, H, W], divisor N.
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, kw_only=True)
class FactorBatch(Batch):
    """Merged groups with factors of their covariance.

    Attributes:
        mean: float32 [B, C, H, W].
        factors: float32 [B, k, C, H, W].
    """

    mean: Tensor
    factors: Tensor


@dataclass(frozen=True, kw_only=True)
class ImageBatch(Batch):
    """Groups of single images.

    Attributes:
        images: float32 [M, C, H, W], the images of the first group, then those of the second, and so on.
        counts: number of images of each group; their sum is M.
    """

    images: Tensor
    counts: list[int]

    @classmethod
    def one_a_group(cls, batch: Batch, images: Tensor) -> ImageBatch:
        """The groups of a batch with one image each, [B, C, H, W]."""
        return cls(
            keys=batch.keys, target=batch.target, clean=batch.clean, images=images, counts=[1] * len(batch.keys)
        )

    def first(self, count: int) -> Self:
        counts = self.counts[:count]
        return super().first(count)._with(counts=counts, images=self.images[: sum(counts)])

    def per_image(self, values: Tensor) -> Tensor:
        """Repeat the row of each group, [B, …], for each of its images, [M, …]."""
        return repeated(values, self.counts)


def repeated(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Repeat row b of `values` [B, …] `counts[b]` times, giving [M, …], without waiting for a GPU."""
    if len(set(counts)) == 1:
        return values[:, None].expand(-1, counts[0], *values.shape[1:]).flatten(0, 1)
    rows = torch.repeat_interleave(torch.tensor(counts))
    return values[rows.to(values.device, non_blocking=True)]


class Read(NamedTuple):
    """Records read for a batch.

    Attributes:
        records: one per group, with only the members that the arm takes.
        shared: attributes that every kind of batch has, by name.
        divisors: divisors of the batch; `stacked` adds to them.
    """

    records: list[Record]
    shared: dict[str, Any]
    divisors: dict[str, Tensor]

    def stacked(self, name: str, quantity: str | None = None, *, joined: bool = False) -> Tensor:
        """Stack a quantity of all records, and add its divisors to `divisors`.

        Args:
            name: name of the tensor in the batch.
            quantity: name of the quantity in `Record.quotient`; None if it is the same.
            joined: concatenate along the first axis instead of adding one.

        Returns:
            The stored integers, or float32 if any record stores the quantity as floats.
        """
        quotients = [record.quotient(quantity or name) for record in self.records]
        exact = [one for one in quotients if one is not None]
        if len(exact) < len(quotients):
            quantity = quantity or name
            decoded = [present(getattr(record, quantity), record, quantity) for record in self.records]
            return torch.from_numpy((np.concatenate if joined else np.stack)(decoded))
        arrays: list[Array] = [one.integers for one in exact]
        values = np.concatenate(arrays) if joined else np.stack(arrays)
        rows = [len(array) for array in arrays] if joined else [1] * len(arrays)
        self.divisors[name] = _divisor(exact, rows, values)
        return torch.from_numpy(values)


def cleans(read: Read) -> Batch:
    """A batch of what all batches share: target and clean image."""
    return Batch(divisors=read.divisors, **read.shared)


def moments(read: Read) -> MomentBatch:
    """Mean and variance of each group."""
    return MomentBatch(
        mean=read.stacked("mean"), variance=read.stacked("variance"), divisors=read.divisors, **read.shared
    )


def factors(read: Read) -> FactorBatch:
    """Mean and stored factors of each group."""
    return FactorBatch(
        mean=read.stacked("mean"), factors=read.stacked("factors"), divisors=read.divisors, **read.shared
    )


def means(read: Read) -> ImageBatch:
    """The mean of each group as its only image."""
    images = read.stacked("images", "mean")
    return ImageBatch(images=images, counts=[1] * len(read.records), divisors=read.divisors, **read.shared)


def members(read: Read) -> ImageBatch:
    """The members that were read of each group."""
    counts = [len(present(record.arrays.get("members"), record, "members")) for record in read.records]
    images = read.stacked("images", "members", joined=True)
    return ImageBatch(images=images, counts=counts, divisors=read.divisors, **read.shared)


def pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """8-bit images as float32 in [0, 1]."""
    return torch.from_numpy(images).float().div_(LEVELS)


def present(value: T | None, record: Record, name: str) -> T:
    """The value, which the manifest promises for every record; ValueError if it is missing."""
    if value is None:
        raise ValueError(f"record {record.key} has no {name}")
    return value


def _divisor(quotients: list[Quotient], rows: list[int], values: Array) -> Tensor:
    """Divisors of all rows, in float32 if dividing in it gives the same float32 results as dividing in float64."""
    divisors = np.repeat([one.divisor for one in quotients], rows).reshape(-1, *[1] * (values.ndim - 1))
    # float32 represents all 16-bit integers. The quotient of two float32 numbers is the same whether rounded once or
    # by way of float64, since 53 ≥ 2 · 24 + 2 bits (Figueroa 1995, When is double rounding innocuous?).
    is_exact = values.dtype.itemsize <= 2 and np.array_equal(divisors.astype(np.float32), divisors)
    return torch.from_numpy(divisors.astype(np.float32 if is_exact else np.float64))


def _quotient(integers: Tensor, divisor: Tensor) -> Tensor:
    # Divide by a tensor: for a Python number a GPU multiplies by the reciprocal, which is off by a bit half the time.
    return integers.to(divisor.dtype).div_(divisor).float()
