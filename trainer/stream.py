"""From stored records to tensors, in the order of `trainer.order`, starting at any step.

Shapes: B groups, M members of all groups of a batch, C H W pixels, K embedding dimensions.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from storage_schemas import Artifact, DatamergeError, Record
from trainer.config import Arm
from trainer.order import Order


class Batch(NamedTuple):
    """Groups of one step.

    Attributes:
        keys: record keys.
        mean: float32 [B, C, H, W] in [0, 1]; None when the arm does not use it.
        variance: float32 [B, C, H, W]; None when the arm does not use it.
        target: embeddings float32 [B, K] or labels int64 [B], whichever the loss takes.
        members: uint8 [M, C, H, W], group after group; None when the arm does not use them.
        counts: members of each group; their sum is M.
    """

    keys: list[str]
    mean: Tensor | None
    variance: Tensor | None
    target: Tensor
    members: Tensor | None
    counts: list[int]

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return self._replace(
            mean=move(self.mean),
            variance=move(self.variance),
            target=self.target.to(device, non_blocking=True),
            members=move(self.members),
        )


class Groups(Dataset[Record | DatamergeError]):
    """The artifact as a map-style dataset.

    A record that cannot be read is returned as its error: a loader worker that raised would wrap the one-line
    message in its own traceback.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __len__(self) -> int:
        return len(self._artifact)

    def __getitem__(self, index: int) -> Record | DatamergeError:
        try:
            return self._artifact[index]
        except DatamergeError as error:
            return error


@dataclass(frozen=True, slots=True)
class Collate:
    """Stacks records to a batch.

    Attributes:
        arm: which tensors are needed.
        labels: the target is the record's label, else its embedding.
        members: how many of each group's first stored members to deliver (a smaller group delivers all it
            has); 0 for none.
    """

    arm: Arm
    labels: bool
    members: int

    def arrays(self) -> set[str]:
        """Names of the stored arrays that this arm reads; the others are left alone."""
        names = {
            "avg": {"sum", "scatter", "mean", "mean_square"},
            "mean-only": {"sum", "mean"},
            "ind": {"members"},
        }
        return names[self.arm] | (set() if self.labels else {"target"})

    def __call__(self, records: list[Record | DatamergeError]) -> Batch | DatamergeError:
        groups: list[Record] = []
        for record in records:
            if isinstance(record, DatamergeError):
                return record
            groups.append(record)
        stored = [self._members(record) for record in groups] if self.members else []
        return Batch(
            keys=[record.key for record in groups],
            mean=_stack([record.mean for record in groups]) if self.arm != "ind" else None,
            variance=_stack([record.variance for record in groups]) if self.arm == "avg" else None,
            target=self._targets(groups),
            members=torch.from_numpy(np.concatenate(stored)) if stored else None,
            counts=[len(members) for members in stored],
        )

    def _targets(self, groups: list[Record]) -> Tensor:
        if self.labels:
            return torch.tensor([_present(record.label, record, "label") for record in groups])
        return _stack([_present(record.target, record, "target") for record in groups])

    def _members(self, record: Record) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return _present(record.members, record, "members")[: self.members]


def _stack(arrays: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


T = TypeVar("T")


def _present(value: T | None, record: Record, name: str) -> T:
    if value is None:
        raise ValueError(f"record {record.key} has no {name}")
    return value


class _Steps(Sampler[list[int]]):
    def __init__(self, order: Order, start: int, stop: int) -> None:
        self._order, self._start, self._stop = order, start, stop

    def __iter__(self) -> Iterator[list[int]]:
        return self._order.batches(self._start, self._stop)

    def __len__(self) -> int:
        return self._stop - self._start


def stream(
    artifact: Artifact, order: Order, collate: Collate, *, start: int, stop: int, workers: int, pin: bool
) -> Iterator[Batch]:
    """Batches of the steps [start, stop).

    Args:
        artifact: where the groups are.
        order: which groups form which step.
        collate: what to deliver of each.
        start: first step, counted from 0.
        stop: step after the last.
        workers: processes that read ahead; 0 reads in this one.
        pin: page-locked memory, for copies to a GPU that overlap with its work.

    Raises:
        CorruptShard: bytes that differ from what was committed.
    """
    loader: DataLoader[Record | DatamergeError] = DataLoader(
        Groups(artifact.only(collate.arrays())),
        batch_sampler=_Steps(order, start, stop),
        collate_fn=collate,
        num_workers=workers,
        # Readers keep threads and locks that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_ignore_signals,
        # A generator of its own: the loader draws a seed for its workers and must not touch the global one.
        generator=torch.Generator(),
        pin_memory=pin,
    )
    for batch in loader:
        if isinstance(batch, DatamergeError):
            raise batch
        yield batch


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the whole process group. The main process decides when to stop and then ends its workers;
    # one that died by itself would turn an orderly stop into an error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
