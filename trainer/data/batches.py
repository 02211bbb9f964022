"""What goes through the model together: records as tensors, pixels as float32 in [0, 1].

Integers travel as they are stored, in a half or a quarter of the bytes, and become float32 where they arrive, by
`Batch.floats`: the same numbers as `Record` gives, to the last bit.

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
    """Groups of one step; every arm trains on one of the kinds below.

    Attributes:
        keys: record keys.
        target: embeddings float32 [B, K] or labels int64 [B], whichever the loss takes.
        clean: float32 [B, C, H, W], the images that the groups were made from, where the run takes them.
        divisors: what tensors that are still integers are to be divided by, by name; a row for each of theirs, in the
            precision in which to divide.
    """

    keys: list[str]
    target: Tensor
    clean: Tensor | None = None
    divisors: dict[str, Tensor] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The attributes by name, all but `divisors`."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "divisors"}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def to(self, device: torch.device) -> Self:
        """The same batch on a device, integers as integers."""
        # Apple's GPUs have no float64.
        batch = self.floats() if device.type == "mps" else self
        return batch._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; the loader calls this."""
        return self._each(lambda tensor: tensor.pin_memory())

    def floats(self) -> Self:
        """The same batch with all that was stored as integers in float32; no device is waited for."""
        made = {name: _quotient(getattr(self, name), divisor) for name, divisor in self.divisors.items()}
        return self._with(divisors={}, **made)

    def first(self, count: int) -> Self:
        """Its first groups, without integers that are to be divided (see `floats`)."""
        return self._each(lambda tensor: tensor[:count])._with(keys=self.keys[:count])

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
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
        images: float32 [M, C, H, W], the images of one group after those of the other.
        counts: images of each group; their sum is M.
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
        """One row for each image, [M, …], from one for each group, [B, …]."""
        return repeated(values, self.counts)


def repeated(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Row b of `values` [B, …] `counts[b]` times, [M, …]; a GPU is not waited for."""
    if len(set(counts)) == 1:
        return values[:, None].expand(-1, counts[0], *values.shape[1:]).flatten(0, 1)
    rows = torch.repeat_interleave(torch.tensor(counts))
    return values[rows.to(values.device, non_blocking=True)]


class Read(NamedTuple):
    """Records on their way into a batch.

    Attributes:
        records: one a group; of its members those alone that the arm takes.
        shared: what every batch holds, by name.
        divisors: those of `shared`, to which the batch adds its own.
    """

    records: list[Record]
    shared: dict[str, Any]
    divisors: dict[str, Tensor]

    def stacked(self, name: str, quantity: str | None = None, *, joined: bool = False) -> Tensor:
        """A tensor of the batch: a quantity of all records that `Record.quotient` knows; adds its divisor.

        Args:
            name: of the tensor.
            quantity: its name there, if that is another.
            joined: along the first axis of the arrays, not a new one.

        Returns:
            Integers as they are stored; float32 if any record has the quantity as such.
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
    """The clean image of each group and nothing else."""
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
    """The members of each group that were read."""
    counts = [len(present(record.arrays.get("members"), record, "members")) for record in read.records]
    images = read.stacked("images", "members", joined=True)
    return ImageBatch(images=images, counts=counts, divisors=read.divisors, **read.shared)


def pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """8-bit images as float32 in [0, 1]."""
    return torch.from_numpy(images).float().div_(LEVELS)


def present(value: T | None, record: Record, name: str) -> T:
    """An array that the manifest promises for every record."""
    if value is None:
        raise ValueError(f"record {record.key} has no {name}")
    return value


def _divisor(quotients: list[Quotient], rows: list[int], values: Array) -> Tensor:
    """The divisor of every row, in the precision in which a quotient, rounded to float32, is that of float64."""
    divisors = np.repeat([one.divisor for one in quotients], rows).reshape(-1, *[1] * (values.ndim - 1))
    # float32 holds all integers of 16 bits. The quotient of two numbers that it holds is rounded alike by way of
    # float64, whose 53 bits are more than 2 · 24 + 2 (Figueroa 1995, When is double rounding innocuous?).
    is_exact = values.dtype.itemsize <= 2 and np.array_equal(divisors.astype(np.float32), divisors)
    return torch.from_numpy(divisors.astype(np.float32 if is_exact else np.float64))


def _quotient(integers: Tensor, divisor: Tensor) -> Tensor:
    # By a tensor: by a number, a GPU multiplies with the reciprocal, which is off by a bit for half of the values.
    return integers.to(divisor.dtype).div_(divisor).float()
