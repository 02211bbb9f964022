"""What goes through the model together: records as tensors, pixels as float32 in [0, 1].

Shapes: B groups, M images of all groups of a batch, k factors, C H W pixels, K embedding dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from storage_schemas import Record
from storage_schemas.schema.moments import LEVELS

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Groups of one step; every arm trains on one of the kinds below.

    Attributes:
        keys: record keys.
        target: embeddings float32 [B, K] or labels int64 [B], whichever the loss takes.
        clean: float32 [B, C, H, W], the images the groups were made from; only where they are refined.
    """

    keys: list[str]
    target: Tensor
    clean: Tensor | None = None

    def content(self) -> dict[str, Any]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device) -> Self:
        """The same batch on a device."""
        return self._with({name: t.to(device, non_blocking=True) for name, t in self._tensors().items()})

    def pin_memory(self) -> Self:
        """The same batch in page-locked memory; the loader calls this."""
        return self._with({name: t.pin_memory() for name, t in self._tensors().items()})

    def _with(self, changed: dict[str, Any]) -> Self:
        return replace(self, **changed)

    def _tensors(self) -> dict[str, Tensor]:
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
        records: one a group.
        words: 64 random bits a group, for arms that pick a member.
        members: how many of a group's first stored members there are to take; a smaller group has fewer.
        shared: what every batch holds, by name.
    """

    records: list[Record]
    words: list[int]
    members: int
    shared: dict[str, Any]


def moments(read: Read) -> MomentBatch:
    """Mean and variance of each group."""
    variance = stack([record.variance for record in read.records])
    return MomentBatch(mean=_means(read), variance=variance, **read.shared)


def factors(read: Read) -> FactorBatch:
    """Mean and stored factors of each group."""
    stored = stack([present(record.factors, record, "factors") for record in read.records])
    return FactorBatch(mean=_means(read), factors=stored, **read.shared)


def means(read: Read) -> ImageBatch:
    """The mean of each group as its only image."""
    return ImageBatch(images=_means(read), counts=[1] * len(read.records), **read.shared)


def first_members(read: Read) -> ImageBatch:
    """The first stored members of each group."""
    return _images([_members(record, read) for record in read.records], read)


def drawn_member(read: Read) -> ImageBatch:
    """One of the first stored members of each group, picked by its random word."""
    chosen = []
    for record, word in zip(read.records, read.words, strict=True):
        members = _members(record, read)
        position = word % len(members)
        chosen.append(members[position : position + 1])
    return _images(chosen, read)


def pixels(images: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """Stored 8-bit images as float32 in [0, 1]."""
    return torch.from_numpy(images).float().div_(LEVELS)


def stack(arrays: list[np.ndarray[Any, np.dtype[np.float32]]]) -> Tensor:
    """Arrays of one shape as a tensor with a row for each."""
    return torch.from_numpy(np.stack(arrays))


def present(value: T | None, record: Record, name: str) -> T:
    """An array that the manifest promises for every record."""
    if value is None:
        raise ValueError(f"record {record.key} has no {name}")
    return value


def _means(read: Read) -> Tensor:
    return stack([record.mean for record in read.records])


def _members(record: Record, read: Read) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return present(record.members, record, "members")[: read.members]


def _images(groups: list[np.ndarray[Any, np.dtype[np.uint8]]], read: Read) -> ImageBatch:
    return ImageBatch(images=pixels(np.concatenate(groups)), counts=[len(group) for group in groups], **read.shared)
