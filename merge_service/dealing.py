"""Which samples, or groups of them, go into which shard: a seeded permutation that reads nothing more than once more.

A shard is a run of `per_shard` places. Sources are sorted by class more often than not, so what fills the places is
permuted:

    samples that are read one by one    all of them
    samples that are read by the block  whole blocks, among those of their size; then samples inside each block that
                                        several shards read, and inside each shard. A shard holds few blocks, and a
                                        block is in as many shards as in the source's order
    groups of several samples           all groups, unless shards would then read more blocks

A block is what a reader reads to give any of its samples (`Source.blocks`), such as a row group of Parquet. Shapes: M
samples or groups, B blocks.
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

# Groups of scattered samples read as many blocks in any order, up to chance.
CHANCE = 1.01


@dataclass(frozen=True, eq=False)
class Blocks:
    """Runs of samples that a reader reads together.

    Attributes:
        sizes: int64 [B], each above 0, in the source's order.
        places: int64 [B], at which place among the blocks of the shards each block is.
    """

    sizes: IntArray
    places: IntArray

    @classmethod
    def of(cls, sizes: Sequence[int] | IntArray) -> Blocks:
        """In the source's order; empty ones are left out."""
        found = np.asarray(sizes, np.int64)
        found = found[found > 0]
        return cls(found, np.arange(len(found)))

    @cached_property
    def ends(self) -> IntArray:
        """int64 [B], where each ends in the source."""
        return np.cumsum(self.sizes)

    def of_samples(self, indices: IntArray) -> IntArray:
        """The block of each sample."""
        return np.searchsorted(self.ends, indices, side="right")


@dataclass(frozen=True, eq=False)
class Dealing:
    """The outcome: which sample, by its index in the source, is at which place.

    Attributes:
        order: int64 [M].
        blocks: of the samples, if they are read by the block.
    """

    order: IntArray
    blocks: Blocks | None = None

    def as_read(self, start: int, stop: int) -> IntArray:
        """The places [start, stop), counted from `start`, so that each block is read once, and files front to back.

        Blocks come in the order in which shards have them: the last of a shard may be the first of the next one.
        """
        indices = self.order[start:stop]
        if self.blocks is None:
            return np.argsort(indices)
        return np.lexsort((indices, self.blocks.places[self.blocks.of_samples(indices)]))


def dealt(groups: Groups, sizes: IntArray | None, per_shard: int, seed: int) -> tuple[Groups, Dealing | None]:
    """Groups in the order of their shards, and how they were dealt where each is one sample.

    Args:
        groups: in the source's order.
        sizes, per_shard, seed: as `deal` takes them.
    """
    if groups.starts is None or groups.members is None:
        dealing = deal(len(groups), sizes, per_shard, seed)
        return groups.take(dealing.order), dealing
    order = deal_groups(groups.starts, groups.members, sizes, per_shard, seed)
    return (groups if order is None else groups.take(order)), None


def deal(count: int, sizes: Sequence[int] | IntArray | None, per_shard: int, seed: int) -> Dealing:
    """Deal samples to shards.

    Args:
        count: M.
        sizes: of the blocks that samples are read by; None where each is read by itself.
        per_shard: places of a shard.
        seed: of the artifact.
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
    """How many shards each of the runs [start, end) of places is in."""
    return (ends - 1) // per_shard - starts // per_shard + 1


def _arranged(blocks: Blocks, per_shard: int, rng: np.random.Generator) -> IntArray:
    """The blocks, each at the place of one of its size that is in as many shards; so none is in more than before.

    Where most have a size of their own, as those of writers that count bytes, they are permuted freely. A block may
    then lie across the end of a shard that it missed before, and another one miss it.
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
    """Deal groups of several samples to shards: which group is at which place; None for the order that they have.

    Args:
        starts: int64 [M + 1], where the samples of each group begin in `samples`, and where the last ones end.
        samples: of all groups, by their index in the source.
        sizes: of the blocks that samples are read by; None where each is read by itself.
        per_shard: places of a shard.
        seed: of the artifact.
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
