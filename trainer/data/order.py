"""Which groups form the batch of a global step: a pure function of (shard sizes, batch size, seed, step).

In every epoch, shards are dealt to k windows of about `shuffle_window` groups, and the groups of a window are
permuted together. Of every k consecutive shards of an artifact each window gets one, at random. So a source that is
sorted by class, and each of several artifacts, are spread evenly over all windows, which a permutation of shards
would not guarantee. Every batch is a random sample of its window, and a reader needs the shards of only one window at
a time.

Let a window hold n groups, p be a position in it, and π the window's permutation of [0, n), which
`trainer.data.permutation` computes by index. The group at p is the π(p)-th of the window's shards laid end to end.
Two binary searches, for the window and for the shard, and one permutation find it. Memory and start-up time grow with
the number of shards, not with the number of groups.

Artifacts have weights: in an artifact of weight w every group occurs ⌊w⌋ times per epoch, and a fraction w − ⌊w⌋ of
the groups once more. The number of these groups is the same in every epoch, their choice differs, and they are the
same proportion of every shard (systematic sampling over permuted shards, Madow 1949), so a sorted artifact keeps its
classes.

The order does not depend on the storage format, the number of loader workers or the location of the artifact, and a
run continues at any step without stored reader state.

A step's batch is cut into one share per process and micro-batch, of sizes that differ by at most one. The
batch is the same in every partition; only its cut differs.

Remainders: nothing is dropped and nothing is repeated. The last batch of an epoch is short, and the loss of every
step is the mean over the groups in it. A share may be empty; its process contributes a zero gradient to the step's
single exchange.

Random streams of the trainer are SeedSequence([seed, purpose, index]) with the purposes `ORDER`, `ESTIMATOR`,
`LAYERS` and `MEMBER`. (A sequence without purpose, [seed, epoch], would equal [seed, epoch, 0], since NumPy pads with
zeros.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from trainer.data.permutation import IntArray, WordArray, keys_of, permuted

BoolArray = npt.NDArray[np.bool_]
Weight = tuple[int, float]
"""Number of shards of an artifact, and how often each of its groups occurs in an epoch."""

SHUFFLE_WINDOW = 2**18
"""Default number of groups that are shuffled together, as in MosaicML's streaming; large enough for rare classes."""
ORDER_VERSION = 2
"""Version of the order, part of a run's identity. Releases before 0.2.0 had version 1: windows of eight shards."""
ORDER, ESTIMATOR, LAYERS, MEMBER = 1, 2, 3, 4


def stream_seeds(seed: int, purpose: int, index: int, count: int) -> list[int]:
    """64 random bits for each of `count` groups; those of the first groups do not depend on `count`.

    Args:
        seed: seed of the run.
        purpose: `ORDER`, `ESTIMATOR` (pseudo-labels and deviations), `LAYERS` (dropout) or `MEMBER`.
        index: step or epoch.
        count: number of groups.
    """
    words: list[int] = np.random.SeedSequence([seed, purpose, index]).generate_state(count, np.uint64).tolist()
    return words


@dataclass(frozen=True, slots=True)
class Partition:
    """How a batch is cut: over `world` processes, each in `accumulate` micro-batches; this process is `rank`."""

    rank: int = 0
    world: int = 1
    accumulate: int = 1


@dataclass(frozen=True, slots=True)
class Share:
    """Groups of one step that go through the model together.

    Attributes:
        first: position of its first group in the step's batch; the others follow.
        indices: indices of the groups in the artifact.
    """

    first: int
    indices: list[int]


WHOLE = Partition()


class _Epoch:
    """The order of one epoch, as arrays with an entry for each occurrence of a shard and for each window.

    Args:
        sizes: number of groups of each shard.
        weights: (number of shards, weight) of each artifact.
        window: approximate number of groups in a window.
        words: 64 random bits for each of the five random choices.
    """

    def __init__(self, sizes: IntArray, weights: Sequence[Weight], window: int, words: Sequence[int]) -> None:
        rotation, dealing, windows, shares, self._members = words
        parts = _passes(sizes, weights, shares)
        shards, taken, partial = (np.concatenate(column) for column in zip(*parts, strict=True))
        count = min(-(-int(taken.sum()) // window), len(shards))
        dealt = _dealt([len(part[0]) for part in parts], count, rotation, dealing)
        chosen = np.argsort(dealt, kind="stable")
        self._shards: IntArray = shards[chosen]
        self._taken: IntArray = taken[chosen]
        self._partial: BoolArray = partial[chosen]
        self._ends = np.cumsum(self._taken)
        self._window_sizes = np.bincount(dealt, taken, count).astype(np.int64)
        self._window_ends = np.cumsum(self._window_sizes)
        self._window_keys = keys_of(windows, np.arange(count))
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes

    def at(self, positions: IntArray) -> IntArray:
        """Indices of the groups at these positions of the epoch."""
        window = np.searchsorted(self._window_ends, positions, "right")
        sizes = self._window_sizes[window]
        starts = self._window_ends[window] - sizes
        places = starts + permuted(positions - starts, sizes, self._window_keys[window])
        entry = np.searchsorted(self._ends, places, "right")
        offsets = places - self._ends[entry] + self._taken[entry]
        shards = self._shards[entry]
        some = np.flatnonzero(self._partial[entry])
        if len(some):
            own = shards[some]
            offsets[some] = permuted(offsets[some], self._sizes[own], keys_of(self._members, own))
        return self._starts[shards] + offsets


Pass = tuple[IntArray, IntArray, BoolArray]
"""Shards, number of groups to take from each, and whether that is only a part of the shard."""


def _passes(sizes: IntArray, weights: Sequence[Weight], shares: int) -> list[Pass]:
    """Passes of an epoch over each artifact: ⌊weight⌋ whole ones and a partial one, without shards not taken from."""
    parts: list[Pass] = []
    first = 0
    for count, weight in weights:
        shards, whole = np.arange(first, first + count), int(weight)
        parts += [(shards, sizes[shards], np.zeros(count, bool))] * whole
        if weight > whole:
            taken = _shares(sizes[shards], weight - whole, keys_of(shares, shards))
            parts.append((shards, taken, np.ones(count, bool)))
        first += count
    some = [np.flatnonzero(taken) for _, taken, _ in parts]
    return [(part[0][own], part[1][own], part[2][own]) for part, own in zip(parts, some, strict=True)]


def _dealt(counts: Sequence[int], windows: int, rotation: int, dealing: int) -> IntArray:
    """Window of each shard, for passes with these numbers of shards."""
    turns, places, first = [], [], 0
    for count, word in zip(counts, keys_of(rotation, np.arange(len(counts))).tolist(), strict=True):
        # Rotate the turns in each epoch; otherwise the same shards would always be in the incomplete turn.
        turn, place = np.divmod((np.arange(count) + word % max(count, 1)) % max(count, 1), windows)
        turns.append(turn + first)
        places.append(place)
        first += -(-count // windows)
    keys = keys_of(dealing, np.concatenate(turns))
    return permuted(np.concatenate(places), np.full(len(keys), windows), keys)


def _shares(sizes: IntArray, fraction: float, keys: WordArray) -> IntArray:
    """Number of groups to take from each shard: the same proportion of all, rounded at random with a fixed sum."""
    total = int(sizes.sum())
    # Lay the shards end to end in random order, set marks at equal distances, and count the marks on each shard.
    line = np.argsort(keys, kind="stable")
    marks = (np.cumsum(sizes[line]) * groups_taken(total, fraction) + int(keys[0]) % total) // total
    taken = np.empty_like(sizes)
    taken[line] = np.diff(marks, prepend=0)
    return taken


def groups_taken(groups: int, weight: float) -> int:
    """Number of groups that an epoch takes from an artifact with `groups` groups and a weight."""
    return int(weight) * groups + math.floor(groups * (weight % 1) + 0.5)


class Order:
    """Batches by global step. Steps and epochs count from 0.

    Args:
        shard_sizes: number of groups of each shard, in storage order, artifact after artifact.
        batch_size: groups per batch.
        seed: seed of the run.
        window: approximate number of groups that are shuffled together, in whole shards; None for all.
        weights: (number of shards, weight) of each artifact; None takes all shards once per epoch.

    Examples:
        >>> order = Order([2, 3], batch_size=2, seed=0)
        >>> order.steps_per_epoch
        3
        >>> sorted(int(i) for step in range(3) for i in order.batch(step))
        [0, 1, 2, 3, 4]
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        seed: int,
        window: int | None = SHUFFLE_WINDOW,
        weights: Sequence[Weight] | None = None,
    ) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._weights = tuple(weights or [(len(self._sizes), 1.0)])
        self._batch_size, self.seed = batch_size, seed
        firsts = np.cumsum([0, *(count for count, _ in self._weights)]).tolist()
        self.groups = sum(
            groups_taken(int(self._sizes[first : first + count].sum()), weight)
            for first, (count, weight) in zip(firsts, self._weights, strict=False)
        )
        self._window = window or max(self.groups, 1)
        self.steps_per_epoch = -(-self.groups // batch_size)
        self._recent: tuple[tuple[int, _Epoch], ...] = ()

    def epoch(self, step: int) -> int:
        """Epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> IntArray:
        """Indices of the groups of one step; thread-safe."""
        return self.batches_joined(step, step + 1)

    def batches_joined(self, start: int, stop: int) -> IntArray:
        """Indices of the groups of the steps [start, stop), laid end to end."""
        epoch, first = self.epoch(start), start
        pieces = []
        while first < stop:
            last = min(stop, (epoch + 1) * self.steps_per_epoch)
            ends = (self.groups_until(step) - epoch * self.groups for step in (first, last))
            pieces.append(self._epoch(epoch).at(np.arange(*ends)))
            epoch, first = epoch + 1, last
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _epoch(self, number: int) -> _Epoch:
        recent = self._recent
        for kept, order in recent:
            if kept == number:
                return order
        order = _Epoch(self._sizes, self._weights, self._window, stream_seeds(self.seed, ORDER, number, 5))
        # Keep two epochs, since a prefetching reader may already be in the next one.
        self._recent = (number, order), *recent[:1]
        return order

    def shares(self, step: int, partition: Partition = WHOLE) -> list[Share]:
        """Micro-batches of one process in one step, in order, without empty ones."""
        batch = self.batch(step)
        pieces = partition.world * partition.accumulate
        mine = range(partition.rank * partition.accumulate, (partition.rank + 1) * partition.accumulate)
        cuts = [piece * len(batch) // pieces for piece in range(pieces + 1)]
        return [Share(cuts[i], batch[cuts[i] : cuts[i + 1]].tolist()) for i in mine if cuts[i] < cuts[i + 1]]

    def batches(self, start: int, stop: int, partition: Partition = WHOLE) -> Iterator[list[int]]:
        """Indices of all micro-batches of this process in the steps [start, stop)."""
        for step in range(start, stop):
            for share in self.shares(step, partition):
                yield share.indices

    def batch_size_of(self, step: int) -> int:
        """Groups of a step over all processes; less than the batch size at the end of an epoch."""
        position = step % self.steps_per_epoch
        return min(self._batch_size, self.groups - position * self._batch_size)

    def groups_until(self, step: int) -> int:
        """Groups consumed by the steps before `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * self.groups + min(position * self._batch_size, self.groups)
