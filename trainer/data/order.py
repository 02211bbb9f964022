"""Which groups form the batch of a global step: a pure function of (shard sizes, batch size, seed, step).

Per epoch, shards are dealt to windows of about `shuffle_window` groups, and the groups of a window are permuted
together. Shards are dealt in turns: of every k of an artifact that follow one another in storage, each of the k
windows gets one, drawn at random. A source that is sorted by class, and each of several artifacts, are thereby
spread evenly over all windows, which a permutation of shards would leave to chance. So a batch is drawn from
everything, as evenly as a window holds it, while a reader works on the shards of one window at a time.

Let a window hold n groups, p be a position in it, and π the window's permutation of [0, n), which
`trainer.data.permutation` computes by index. The group there is the π(p)-th of the window's shards laid end to end.
Two binary searches, for the window and for the shard, and one permutation find it. What is kept grows with the
shards; neither memory nor start depends on the number of groups.

Artifacts have weights: of weight w every group occurs ⌊w⌋ times an epoch, and a share w − ⌊w⌋ of them once more.
That share is the same number of groups every epoch, others each time, the same proportion of every shard (systematic
sampling over permuted shards, Madow 1949), so that a sorted artifact keeps its classes.

Neither the storage format nor the number of loader workers nor the place of the artifact enters, and a run
continues at any step without stored reader state.

A step's batch is cut into one share per process and micro-batch, of sizes that differ by at most one. The
batch is the same in every partition; only its cut differs.

Policy for what does not divide: nothing is dropped and nothing is repeated. The last batch of an epoch is
short, the loss of every step is the mean over the groups that are in it, and a share may be empty; a process
with an empty share contributes a zero gradient to the one exchange that each step has, so no process waits for
another and no group counts twice.

Random streams of the trainer are SeedSequence([seed, purpose, index]); the purposes are named here. (A
sequence without purpose, [seed, epoch], would be the same stream as [seed, epoch, 0]: numpy pads with
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
"""Groups that are shuffled together; as MosaicML's streaming. In a window of this size no class is scarce."""
ORDER_VERSION = 2
"""Of releases before 0.2.0: 1. Those shuffled eight shards together."""
ORDER, ESTIMATOR, LAYERS, MEMBER = 1, 2, 3, 4


def stream_seeds(seed: int, purpose: int, index: int, count: int) -> list[int]:
    """64 random bits for each of `count` groups; those of the first groups do not depend on `count`.

    Args:
        seed: the run's.
        purpose: `ORDER`, `ESTIMATOR` (pseudo-labels and directions), `LAYERS` (dropout) or `MEMBER`.
        index: step or epoch.
        count: how many.
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
        first: position of the first of them in the step's batch; the others follow.
        indices: of the groups, in the artifact.
    """

    first: int
    indices: list[int]


WHOLE = Partition()


class _Epoch:
    """The order of one epoch: arrays with an entry for each shard, as often as it occurs, and for each window.

    Args:
        sizes: groups of all shards.
        weights: (number of shards, weight) of each artifact.
        window: groups of a window, about.
        words: 64 random bits for each of the five choices.
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
"""Shards, groups to take of each, and whether these are a share of its groups."""


def _passes(sizes: IntArray, weights: Sequence[Weight], shares: int) -> list[Pass]:
    """What an epoch takes: each artifact as often as it weighs, without shards of which it takes nothing."""
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
    """The window of each shard of passes of these lengths."""
    turns, places, first = [], [], 0
    for count, word in zip(counts, keys_of(rotation, np.arange(len(counts))).tolist(), strict=True):
        # Turns begin elsewhere in each epoch, or the same shards would always be in the incomplete one.
        turn, place = np.divmod((np.arange(count) + word % max(count, 1)) % max(count, 1), windows)
        turns.append(turn + first)
        places.append(place)
        first += -(-count // windows)
    keys = keys_of(dealing, np.concatenate(turns))
    return permuted(np.concatenate(places), np.full(len(keys), windows), keys)


def _shares(sizes: IntArray, fraction: float, keys: WordArray) -> IntArray:
    """Groups to take of each shard; of all the same proportion, rounded at random so that the sum is fixed."""
    total = int(sizes.sum())
    # Shards are laid end to end at random, and marks at equal distances: how many are on each?
    line = np.argsort(keys, kind="stable")
    marks = (np.cumsum(sizes[line]) * groups_taken(total, fraction) + int(keys[0]) % total) // total
    taken = np.empty_like(sizes)
    taken[line] = np.diff(marks, prepend=0)
    return taken


def groups_taken(groups: int, weight: float) -> int:
    """How many groups an epoch takes of an artifact with so many."""
    return int(weight) * groups + math.floor(groups * (weight % 1) + 0.5)


class Order:
    """Batches by global step. Steps and epochs count from 0.

    Args:
        shard_sizes: groups of each shard, in storage order, those of one artifact after those of the other.
        batch_size: groups of a batch.
        seed: of the run.
        window: groups that are shuffled together, about: whole shards, at least one; None for everything.
        weights: (number of shards, weight) of each artifact; all shards once an epoch if not given.

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
        """Indices of the groups of one step; threads may ask at the same time."""
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
        # Two, for a reader that is ahead at the end of an epoch.
        self._recent = (number, order), *recent[:1]
        return order

    def shares(self, step: int, partition: Partition = WHOLE) -> list[Share]:
        """What one process does in one step: its micro-batches, in order, without the empty ones."""
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
