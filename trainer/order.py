"""Which groups form the batch of a global step: a pure function of (shard sizes, batch size, seed, step).

Per epoch, shards are permuted and cut into windows of `WINDOW`; the groups of a window are shuffled together.
A reader therefore touches a few shards at a time, whatever the size of the artifact. Neither the storage
format nor the number of loader workers enters, and a run continues at any step without stored reader state.

The last batch of an epoch is kept when it is short: every group counts once per epoch, and a step's loss is
the mean over the groups that are in its batch.

Random streams of the trainer are SeedSequence([seed, purpose, index]); the purposes are named here. (A
sequence without purpose, [seed, epoch], would be the same stream as [seed, epoch, 0]: numpy pads with
zeros.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

WINDOW = 8
ORDER, PSEUDO_LABELS, LAYERS = 1, 2, 3


def stream_seed(seed: int, purpose: int, index: int) -> int:
    """64 random bits for one purpose (`ORDER`, `PSEUDO_LABELS`, `LAYERS`) and one step or epoch."""
    return int(np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0])


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

    >>> order = Order([2, 3], batch_size=2, seed=0)
    >>> order.steps_per_epoch
    3
    >>> sorted(int(i) for step in range(3) for i in order.batch(step))
    [0, 1, 2, 3, 4]
    """

    def __init__(self, shard_sizes: Sequence[int], batch_size: int, seed: int) -> None:
        self._shard_sizes = tuple(shard_sizes)
        self._batch_size, self._seed = batch_size, seed
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
            self._cached = epoch, epoch_order(self._shard_sizes, self._seed, epoch)
        return self._cached[1][position * self._batch_size : (position + 1) * self._batch_size]

    def batches(self, start: int, stop: int) -> Iterator[list[int]]:
        """Batches of the steps [start, stop)."""
        for step in range(start, stop):
            yield self.batch(step).tolist()

    def groups_until(self, step: int) -> int:
        """Groups consumed by the steps before `step`."""
        epoch, position = divmod(step, self.steps_per_epoch)
        return epoch * self.groups + min(position * self._batch_size, self.groups)
