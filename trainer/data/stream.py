"""From stored records to tensors, in the order of `trainer.data.order`, starting at any step.

Shapes: B groups, M members of all groups of a batch, C H W pixels, K embedding dimensions.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from storage_schemas import Artifact, ConfigError, DatamergeError, Record
from trainer.config import Arm
from trainer.data.order import MEMBER, WHOLE, Layout, Order, stream_seeds


class Batch(NamedTuple):
    """Groups that go through the model together.

    Attributes:
        keys: record keys.
        mean: float32 [B, C, H, W] in [0, 1]; None when the arm does not use it.
        variance: float32 [B, C, H, W]; None when the arm does not use it.
        target: embeddings float32 [B, K] or labels int64 [B], whichever the loss takes.
        members: uint8 [M, C, H, W], group after group; None when the arm does not use them.
        counts: members of each group; their sum is M.
        factors: float32 [B, k, C, H, W]; None when the arm does not use them.
        clean: uint8 [B, C, H, W], the images the groups were made from; None unless they are asked for.
    """

    keys: list[str]
    mean: Tensor | None
    variance: Tensor | None
    target: Tensor
    members: Tensor | None
    counts: list[int]
    factors: Tensor | None = None
    clean: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return self._replace(
            mean=move(self.mean),
            variance=move(self.variance),
            factors=move(self.factors),
            clean=move(self.clean),
            target=self.target.to(device, non_blocking=True),
            members=move(self.members),
        )


class Wanted(NamedTuple):
    """One item of a batch: which group, and 64 random bits for the arm random-member."""

    group: int
    word: int


class Groups(Dataset["tuple[Record, int] | DatamergeError"]):
    """The artifact as a map-style dataset, asked by `Wanted`.

    A record that cannot be read is returned as its error: a loader worker that raised would wrap the one-line
    message in its own traceback.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __len__(self) -> int:
        return len(self._artifact)

    def __getitem__(self, wanted: Wanted) -> tuple[Record, int] | DatamergeError:
        try:
            return self._artifact[wanted.group], wanted.word
        except DatamergeError as error:
            return error


@dataclass(frozen=True, slots=True)
class Collate:
    """Stacks records to a batch.

    Attributes:
        arm: which tensors are needed.
        labels: the target is the record's label, else its embedding.
        members: how many of each group's first stored members to deliver, or to choose one from (a smaller
            group delivers all it has); 0 for none.
        classes: labels must be below this.
        clean: deliver the clean images too.
    """

    arm: Arm
    labels: bool
    members: int
    classes: int | None = None
    clean: bool = False

    def arrays(self) -> set[str]:
        """Names of the stored arrays that this arm reads; the others are left alone."""
        names = {
            "avg": {"sum", "scatter", "mean", "mean_square"},
            "factors": {"sum", "mean", "factors"},
            "mean-only": {"sum", "mean"},
            "ind": {"members"},
            "random-member": {"members"},
        }
        return names[self.arm] | (set() if self.labels else {"target"}) | ({"clean"} if self.clean else set())

    def __call__(self, items: list[tuple[Record, int] | DatamergeError]) -> Batch | DatamergeError:
        found: list[tuple[Record, int]] = []
        for item in items:
            if isinstance(item, DatamergeError):
                return item
            found.append(item)
        groups = [record for record, _ in found]
        stored = [self._members(record, word) for record, word in found] if self.members else []
        try:
            target = self._targets(groups)
        except ConfigError as error:
            return error
        return Batch(
            keys=[record.key for record in groups],
            mean=None if self.members else _stack([record.mean for record in groups]),
            variance=_stack([record.variance for record in groups]) if self.arm == "avg" else None,
            target=target,
            members=torch.from_numpy(np.concatenate(stored)) if stored else None,
            counts=[len(members) for members in stored],
            factors=self._factors(groups) if self.arm == "factors" else None,
            clean=torch.from_numpy(np.stack([_present(record.clean, record, "clean image") for record in groups]))
            if self.clean
            else None,
        )

    def _targets(self, groups: list[Record]) -> Tensor:
        if self.labels:
            return torch.tensor([check_label(record.key, record.label, self.classes) for record in groups])
        return _stack([_present(record.target, record, "target") for record in groups])

    def _factors(self, groups: list[Record]) -> Tensor:
        return _stack([_present(record.factors, record, "factors") for record in groups])

    def _members(self, record: Record, word: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        members = _present(record.members, record, "members")[: self.members]
        if self.arm == "random-member":
            chosen = word % len(members)
            return members[chosen : chosen + 1]
        return members


def check_label(key: str, label: int | None, classes: int | None) -> int:
    """The label, if cross entropy can take it.

    Raises:
        ConfigError: there is none, or it is none of the classes.
    """
    if label is None:
        raise ConfigError(
            f"loss: cross_entropy expects a label for every group, found none for record {key}; "
            "use --loss squared_error"
        )
    if not 0 <= label < (classes if classes is not None else label + 1):
        raise ConfigError(
            f"loss: cross_entropy expects labels below {classes}, the classes of the head (or the outputs of an "
            f"encoder without one), found label {label} at record {key}; choose another --head or --encoder"
        )
    return label


def _stack(arrays: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


T = TypeVar("T")


def _present(value: T | None, record: Record, name: str) -> T:
    if value is None:
        raise ValueError(f"record {record.key} has no {name}")
    return value


class _Steps(Sampler[list[Wanted]]):
    def __init__(self, order: Order, layout: Layout, start: int, stop: int, draws: bool) -> None:
        self._order, self._layout, self._start, self._stop, self._draws = order, layout, start, stop, draws

    def __iter__(self) -> Iterator[list[Wanted]]:
        for step in range(self._start, self._stop):
            for share in self._order.shares(step, self._layout):
                words = [0] * len(share.indices)
                if self._draws:
                    last = share.first + len(share.indices)
                    words = stream_seeds(self._order.seed, MEMBER, step, last)[share.first :]
                yield [Wanted(index, word) for index, word in zip(share.indices, words, strict=True)]


def stream(
    artifact: Artifact,
    order: Order,
    collate: Collate,
    *,
    start: int,
    stop: int,
    workers: int,
    pin: bool,
    layout: Layout = WHOLE,
) -> Iterator[Batch]:
    """Micro-batches of the steps [start, stop), as `order.shares` lists them.

    Args:
        artifact: where the groups are.
        order: which groups form which step.
        collate: what to deliver of each.
        start: first step, counted from 0.
        stop: step after the last.
        workers: processes that read ahead; 0 reads ahead in a thread of this one.
        pin: page-locked memory, for copies to a GPU that overlap with its work.
        layout: which part of each step is ours.

    Raises:
        CorruptShard: bytes that differ from what was committed.
        ConfigError: a label that is missing or out of range.
    """
    loader: DataLoader[tuple[Record, int] | DatamergeError] = DataLoader(
        Groups(artifact.only(collate.arrays())),
        batch_sampler=_Steps(order, layout, start, stop, collate.arm == "random-member"),
        collate_fn=collate,
        num_workers=workers,
        # Readers keep threads and locks that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_ignore_signals,
        # A generator of its own: the loader draws a seed for its workers and must not touch the global one.
        generator=torch.Generator(),
        pin_memory=pin,
    )
    for batch in loader if workers else _ahead(iter(loader)):
        if isinstance(batch, DatamergeError):
            raise batch
        yield batch


def _ahead(batches: Iterator[T]) -> Iterator[T]:
    """The same items, the next of them already being made in a thread (decompression and hashes release the GIL)."""
    end = object()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="read") as pool:
        upcoming = pool.submit(next, batches, end)
        while (item := upcoming.result()) is not end:
            upcoming = pool.submit(next, batches, end)
            yield item  # type: ignore[misc]  # not `end`


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the whole process group. The main process decides when to stop and then ends its workers;
    # one that died by itself would turn an orderly stop into an error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
