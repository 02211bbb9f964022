"""Which groups form the batch of a global step: a pure function of (shard sizes, batch size, seed, step).

Per epoch, shards are permuted and cut into windows of `WINDOW`; the groups of a window are shuffled together.
A reader therefore touches a few shards at a time, whatever the size of the artifact. Neither the storage
format nor the number of loader workers enters, and a run continues at any step without stored reader state.

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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

WINDOW = 8
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


def epoch_order(shard_sizes: Sequence[int], seed: int, epoch: int, window: int = WINDOW) -> IntArray:
    """All group indices of one epoch, each exactly once.

    Args:
        shard_sizes: groups of each shard, in storage order.
        seed: the run's seed.
        epoch: counted from 0.
        window: shards whose groups are shuffled together.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, ORDER, epoch]))
    ends = np.cumsum(shard_sizes, dtype=np.int64)
    shards = rng.permutation(len(shard_sizes))
    pieces = []
    for first in range(0, len(shards), window):
        groups = [np.arange(ends[s] - shard_sizes[s], ends[s]) for s in shards[first : first + window]]
        pieces.append(rng.permutation(np.concatenate(groups)))
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


class Order:
    """Batches by global step. Steps and epochs count from 0.

    Examples:
        >>> order = Order([2, 3], batch_size=2, seed=0)
        >>> order.steps_per_epoch
        3
        >>> sorted(int(i) for step in range(3) for i in order.batch(step))
        [0, 1, 2, 3, 4]
    """

    def __init__(self, shard_sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self._shard_sizes = tuple(shard_sizes)
        self._batch_size, self.seed = batch_size, seed
        self.groups = sum(self._shard_sizes)
        self.steps_per_epoch = -(-self.groups // batch_size)
        self._cached: tuple[int, IntArray] | None = None

    def epoch(self, step: int) -> int:
        """Epoch that a step belongs to."""
        return step // self.steps_per_epoch

    def batch(self, step: int) -> IntArray:
        """Indices of the groups of one step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, epoch_order(self._shard_sizes, self.seed, epoch)
        return self._cached[1][position * self._batch_size : (position + 1) * self._batch_size]

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
