"""Groups of given samples, added up in parts: the result does not depend on the order or on the workers.

Sums of 8-bit pixels are integers, so partial moments combine exactly. Sums of embeddings are float64, and are
combined in the order of the parts, which the plan fixes.

Shapes: C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from datamerge.attacks import arithmetic, quotient
from datamerge.encoders import Encoder
from datamerge.runtime.memory import out_of_memory_advice
from datamerge.sources import Sample
from merge_service.config import MergeConfig
from merge_service.planning import ShardTask
from merge_service.reading import PixelReader, Pixels
from storage_schemas import ExactMoments, Layout, Record, Reject
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Array, encode_exact

# Samples whose pixels are in memory at a time.
READ_AT_ONCE = 256


@dataclass
class PartialGroup:
    """Sums over some of a group's samples.

    Attributes:
        count, sum, sum_of_squares: as in ExactMoments; int64 [C, H, W].
        names: (position in the group, name) of each usable sample.
        embedding: sum of the samples' embeddings, float64 [K].
        members: pixels by position, if members are stored.
    """

    count: int = 0
    sum: npt.NDArray[np.int64] | None = None
    sum_of_squares: npt.NDArray[np.int64] | None = None
    names: list[tuple[int, str]] = field(default_factory=list)
    embedding: npt.NDArray[np.float64] | None = None
    members: dict[int, Pixels] = field(default_factory=dict)

    def add(self, position: int, name: str, pixels: Pixels) -> None:
        """Add one sample."""
        if self.sum is None or self.sum_of_squares is None:
            self.sum = np.zeros(pixels.shape, np.int64)
            self.sum_of_squares = np.zeros(pixels.shape, np.int64)
        self.sum += pixels
        self.sum_of_squares += np.square(pixels, dtype=np.uint16)  # 255² fits 16 bits
        self.count += 1
        self.names.append((position, name))

    def add_embedding(self, embedding: npt.NDArray[np.float64]) -> None:
        """Add an embedding, or a sum of embeddings."""
        self.embedding = embedding if self.embedding is None else self.embedding + embedding

    def combine(self, other: PartialGroup) -> None:
        """Add the sums of another part."""
        if other.sum is None or other.sum_of_squares is None:
            return
        self.sum = other.sum if self.sum is None else self.sum + other.sum
        squares = other.sum_of_squares
        self.sum_of_squares = squares if self.sum_of_squares is None else self.sum_of_squares + squares
        self.count += other.count
        self.names += other.names
        self.members |= other.members
        if other.embedding is not None:
            self.add_embedding(other.embedding)


@dataclass
class Partial:
    """Sums over some of a shard's samples: groups by their index, rejects by (group, position), and remarks."""

    groups: dict[int, PartialGroup] = field(default_factory=dict)
    rejects: dict[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def combine(self, other: Partial) -> None:
        """Add another part."""
        for index, group in other.groups.items():
            self.groups.setdefault(index, PartialGroup()).combine(group)
        self.rejects |= other.rejects
        self.remarks += other.remarks


class Accumulator:
    """Adds up samples into moments.

    Args:
        encoder: its embeddings become targets; None for label targets.
    """

    def __init__(self, config: MergeConfig, layout: Layout, reader: PixelReader, encoder: Encoder | None) -> None:
        self._config = config
        self._layout = layout
        self._reader = reader
        self._encoder = encoder

    def add_up(self, items: Sequence[tuple[int, int, Sample]]) -> Partial:
        """Add up (group, position, sample) items."""
        partial = Partial()
        for start in range(0, len(items), READ_AT_ONCE):
            some = items[start : start + READ_AT_ONCE]
            self._add(some, self._reader.read([sample for _, _, sample in some], partial.remarks), partial)
        return partial

    def _add(
        self, items: Sequence[tuple[int, int, Sample]], images: Sequence[Pixels | str], partial: Partial
    ) -> None:
        usable: list[tuple[PartialGroup, Pixels]] = []
        for (index, position, sample), image in zip(items, images, strict=True):
            if isinstance(image, str):
                partial.rejects[index, position] = (sample.name, image)
                continue
            group = partial.groups.setdefault(index, PartialGroup())
            group.add(position, sample.name, image)
            if self._config.keep_members:
                group.members[position] = image
            usable.append((group, image))
        if self._encoder is None or not self._config.stores_embedding or not usable:
            return
        embeddings = embed(self._encoder, np.stack([image for _, image in usable]), self._config.batch_size)
        for (group, _), embedding in zip(usable, embeddings, strict=True):
            group.add_embedding(embedding.astype(np.float64))

    def records(self, task: ShardTask, partial: Partial) -> tuple[list[Record], list[Reject]]:
        """Records and rejects of a shard, from the sums over all its samples."""
        rejects = [
            Reject(key=task.groups[index].key, sample=name, reason=reason)
            for (index, _), (name, reason) in sorted(partial.rejects.items())
        ]
        return [self._record(task, index, partial.groups[index]) for index in sorted(partial.groups)], rejects

    def _record(self, task: ShardTask, index: int, group: PartialGroup) -> Record:
        if group.sum is None or group.sum_of_squares is None:
            raise ValueError(f"group {task.groups[index].key} has no sample")
        arrays: dict[str, Array] = encode_exact(
            ExactMoments(group.count, group.sum, group.sum_of_squares), self._layout
        )
        if self._config.stores_embedding and group.embedding is not None:
            arrays["target"] = (group.embedding / group.count).astype(np.float32)
        if self._config.keep_members:
            arrays["members"] = self._members(group)
        return Record(
            key=task.groups[index].key,
            count=group.count,
            encoding=self._layout.encoding,
            arrays=arrays,
            label=task.groups[index].label,
            samples=tuple(name for _, name in sorted(group.names)),
        )

    def _members(self, group: PartialGroup) -> Pixels:
        """Members in the group's order, padded with zeros to the stored shape."""
        members = np.stack([group.members[position] for position in sorted(group.members)])
        spec = self._layout.array("members")
        missing = (spec.shape[0] if spec else 0) - len(members)
        return np.pad(members, ((0, missing), (0, 0), (0, 0), (0, 0)))


def embed(encoder: Encoder, images: Pixels, batch_size: int) -> npt.NDArray[np.float32]:
    """Embeddings float32 [B, K] of pixels uint8 [B, C, H, W], in batches.

    Raises:
        DatamergeError: out of memory.
    """
    device = encoder.mean.device

    def advice() -> str:
        return (
            f"out of memory on {device} while {min(batch_size, len(images))} images were embedded at once; "
            f"try a smaller `batch_size`"
        )

    with out_of_memory_advice(advice), torch.no_grad(), arithmetic(device):
        parts = []
        for start in range(0, len(images), batch_size):
            levels = torch.from_numpy(images[start : start + batch_size]).to(device).float()
            parts.append(encoder(quotient(levels, LEVELS)).float().cpu())
    return torch.cat(parts).numpy()
