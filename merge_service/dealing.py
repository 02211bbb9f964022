"""Assigns samples or groups to shards: a seeded permutation that does not make shards read more of the source.

A shard is a run of `per_shard` consecutive places. Sources are often sorted by class, so their order is permuted:

    samples read one by one     all samples
    samples read in blocks      whole blocks, among blocks of equal size; then the samples inside each block that
                                several shards read, and inside each shard. So a shard reads few blocks, and a block
                                is read by as many shards as in the source's order
    groups of several samples   all groups, unless shards would then read more blocks

A block is the unit that a reader reads for any of its samples (`Source.blocks`), such as a row group of Parquet.

Shapes: M samples or groups, B blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from merge_service.grouping import Groups
from storage_schemas.schema.seeds import ORDER, purpose_seed

IntArray = npt.NDArray[np.int64]

# Tolerance for chance: groups of scattered samples read about as many blocks in any order.
CHANCE = 1.01


@dataclass(frozen=True, eq=False)
class Blocks:
    """Runs of samples that a reader reads together.

    Attributes:
        sizes: int64 [B], number of samples of each block, above 0, in the source's order.
        places: int64 [B], place of each block in the order in which shards read them.
    """

    sizes: IntArray
    places: IntArray

    @classmethod
    def of(cls, sizes: Sequence[int] | IntArray) -> Blocks:
        """Blocks of these sizes in the source's order, without empty ones."""
        found = np.asarray(sizes, np.int64)
        found = found[found > 0]
        return cls(found, np.arange(len(found)))

    @cached_property
    def ends(self) -> IntArray:
        """int64 [B], where each block ends in the source."""
        return np.cumsum(self.sizes)

    def of_samples(self, indices: IntArray) -> IntArray:
        """The block of each sample."""
        return np.searchsorted(self.ends, indices, side="right")


@dataclass(frozen=True, eq=False)
class Dealing:
    """The order of the samples.

    Attributes:
        order: int64 [M], index in the source of the sample at each place.
        blocks: blocks of the source; None if samples are read one by one.
    """

    order: IntArray
    blocks: Blocks | None = None

    def as_read(self, start: int, stop: int) -> IntArray:
        """The places [start, stop), relative to `start`, sorted so that each block is read once, front to back.

        Blocks keep their order across shards, as the last block of a shard may be the first of the next one.
        """
        indices = self.order[start:stop]
        if self.blocks is None:
            return np.argsort(indices)
        return np.lexsort((indices, self.blocks.places[self.blocks.of_samples(indices)]))


def dealt(groups: Groups, sizes: IntArray | None, per_shard: int, seed: int) -> tuple[Groups, Dealing | None]:
    """The groups in the order of the shards, and the order of the samples if each group is one sample.

    Args:
        groups: groups in the source's order.
        sizes, per_shard, seed: see `deal`.
    """
    if groups.starts is None or groups.members is None:
        dealing = deal(len(groups), sizes, per_shard, seed)
        return groups.take(dealing.order), dealing
    order = deal_groups(groups.starts, groups.members, sizes, per_shard, seed)
    return (groups if order is None else groups.take(order)), None


def deal(count: int, sizes: Sequence[int] | IntArray | None, per_shard: int, seed: int) -> Dealing:
    """Assign samples to shards.

    Args:
        count: number of samples, M.
        sizes: number of samples of each block; None if samples are read one by one.
        per_shard: number of places in a shard.
        seed: seed of the artifact.
    """
    rng = np.random.default_rng(purpose_seed(seed, ORDER))
    if sizes is None:
        return Dealing(rng.permutation(count))
    blocks = Blocks.of(sizes)
    if blocks.sizes.sum() != count:
        raise ValueError(f"expected blocks of {count} samples, found {blocks.sizes.sum()}")
    arranged = _arranged(blocks, per_shard, rng)
    lengths = blocks.sizes[arranged]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    order = np.repeat((blocks.ends - blocks.sizes)[arranged] - starts, lengths) + np.arange(count)
    for block in np.flatnonzero(shards_of(starts, ends, per_shard) > 1):
        rng.shuffle(order[starts[block] : ends[block]])
    for start in range(0, count, per_shard):
        rng.shuffle(order[start : start + per_shard])
    places = np.empty_like(arranged)
    places[arranged] = np.arange(len(arranged))
    return Dealing(order, Blocks(blocks.sizes, places))


def shards_of(starts: IntArray, ends: IntArray, per_shard: int) -> IntArray:
    """Number of shards that each run [start, end) of places overlaps."""
    return (ends - 1) // per_shard - starts // per_shard + 1


def _arranged(blocks: Blocks, per_shard: int, rng: np.random.Generator) -> IntArray:
    """Permute the blocks among those of equal size that overlap equally many shards, so no shard reads more.

    If most blocks have a unique size, as with writers that limit bytes, all are permuted freely. A block may then
    cross the end of a shard that it did not cross before, and another block no longer cross it.
    """
    sizes, ends = blocks.sizes, blocks.ends
    _, of_size, times = np.unique(sizes, return_inverse=True, return_counts=True)
    if 2 * sizes[times[of_size] > 1].sum() < sizes.sum():
        return rng.permutation(len(sizes))
    shards = shards_of(ends - sizes, ends, per_shard)
    alike = of_size * (shards.max() + 1) + shards
    arranged: IntArray = np.empty_like(alike)
    arranged[np.argsort(alike, kind="stable")] = np.lexsort((rng.random(len(alike)), alike))
    return arranged


def deal_groups(
    starts: IntArray, samples: IntArray, sizes: Sequence[int] | IntArray | None, per_shard: int, seed: int
) -> IntArray | None:
    """Assign groups of several samples to shards: the group at each place, or None to keep the order.

    Args:
        starts: int64 [M + 1], where the samples of each group begin in `samples`; then the total.
        samples: indices in the source of the samples of all groups.
        sizes: number of samples of each block; None if samples are read one by one.
        per_shard: number of places in a shard.
        seed: seed of the artifact.
    """
    count = len(starts) - 1
    order = np.random.default_rng(purpose_seed(seed, ORDER)).permutation(count)
    if sizes is None:
        return order
    blocks = Blocks.of(sizes)
    found, of_samples = np.repeat(np.arange(count), np.diff(starts)), blocks.of_samples(samples)
    places = np.empty_like(order)
    places[order] = np.arange(count)
    before, after = (
        len(np.unique(shard * len(blocks.sizes) + of_samples))
        for shard in (found // per_shard, places[found] // per_shard)
    )
    return order if after <= CHANCE * before else None
