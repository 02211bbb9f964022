"""Stream batches from artifacts, in the order of `trainer.data.order`, from any step on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from datamerge.runtime.messages import first_line, warn
from datamerge.runtime.read_ahead import read_ahead
from storage_schemas import Artifact, ConfigError, DatamergeError, Record
from trainer.arms import ARMS, ArmName, CleanName
from trainer.data.ahead import Ahead, Course
from trainer.data.batches import Batch, Read, present
from trainer.data.blend import Blend
from trainer.data.order import MEMBER, WHOLE, Order, Partition, stream_seeds
from trainer.data.shipping import LOADERS, SHARED_MEMORY, Parcel, Shipping, senders


class Wanted(NamedTuple):
    """Request for one item of a batch: index of the group, and 64 random bits for arms that draw a member."""

    group: int
    word: int


class Asked(NamedTuple):
    """Request for a micro-batch: position and step as in `Piece`, and its groups."""

    position: int
    step: int
    wanted: list[Wanted]


class Groups(Dataset["Record | DatamergeError"]):
    """Artifacts as a map-style dataset, indexed by `Wanted`.

    For a record that cannot be read the dataset returns the error: if a loader worker raised it, torch would wrap the
    one-line message in a traceback.

    Args:
        artifacts: the artifacts; remote ones are prefetched if there is a course.
        course: the order in which groups will be read; None if it is unknown.
        rows: (random bits of the group, number of members) → rows to read of each array; None reads all rows.
    """

    def __init__(
        self,
        artifacts: Artifact | Blend,
        course: Course | None = None,
        rows: Callable[[int, int], Mapping[str, slice]] | None = None,
    ) -> None:
        self._groups = Blend.of(artifacts)
        self._rows = rows
        self._course = None if self._groups.is_local else course
        self._ahead: Ahead | None = None

    def __len__(self) -> int:
        return len(self._groups)

    def __getitems__(self, asked: Asked) -> list[Record | DatamergeError]:
        if self._course is not None:
            if self._ahead is None:
                info = get_worker_info()
                self._ahead = Ahead(self._groups, self._course, *((info.id, info.num_workers) if info else ()))
            self._ahead.reach(asked.position, asked.step)
        items: list[Record | DatamergeError] = []
        for wanted in asked.wanted:
            items.append(self[wanted])
            if isinstance(items[-1], DatamergeError):
                break  # the batch is lost, so the rest of it need not be read
        return items

    def close(self) -> None:
        """Stop prefetching."""
        if self._ahead is not None:
            self._ahead.close()

    def __getitem__(self, wanted: Wanted) -> Record | DatamergeError:
        try:
            rows = None if self._rows is None else partial(self._rows, wanted.word)
            return self._groups.read(wanted.group, rows)
        except DatamergeError as error:
            return error
        except OSError as error:
            return DatamergeError(f"{self._groups.where(wanted.group)}: {first_line(error)}")


@dataclass(frozen=True, slots=True)
class Collate:
    """Stacks records to a batch.

    Attributes:
        arm: name of the arm, which determines the kind of batch.
        labels: whether targets are labels; otherwise they are embeddings.
        members: number of stored members per group to use, from the first; ignored by arms that read no members.
        classes: number of classes, which labels must be below.
        clean: quantity that holds the clean image, to be delivered too: `clean`, or `mean` for groups of one
            unattacked image; None delivers no clean images.
        rows: class in training of each label; None if they are the same number.
    """

    arm: ArmName
    labels: bool
    members: int
    classes: int | None = None
    clean: CleanName | None = None
    rows: Mapping[int, int] | None = None

    def arrays(self) -> set[str]:
        """Names of the stored arrays to read."""
        clean = {"mean": {"sum", "mean"}, "clean": {"clean"}, None: set[str]()}[self.clean]
        return set(ARMS[self.arm].arrays) | (set() if self.labels else {"target"}) | clean

    def taken(self, word: int, count: int) -> Mapping[str, slice]:
        """Rows to read of the arrays of a group with `count` members, chosen by its random bits."""
        choose = ARMS[self.arm].choose
        return {} if choose is None else {"members": choose(word, min(count, self.members))}

    def __call__(self, items: list[Record | DatamergeError]) -> Batch | DatamergeError:
        records = []
        for item in items:
            if isinstance(item, DatamergeError):
                return item
            records.append(item)
        shared: dict[str, Any] = {"keys": [record.key for record in records]}
        try:
            shared["target"] = self._targets(records)
        except ConfigError as error:
            return error
        read = Read(records, shared, {})
        if self.clean:
            shared["clean"] = read.stacked("clean", self.clean)
        batch: Batch = ARMS[self.arm].batch(read)
        return batch

    def _targets(self, records: list[Record]) -> Tensor:
        if self.labels:
            labels = [check_label(record.key, record.label, self.classes, self.rows) for record in records]
            return torch.tensor(labels)
        return torch.from_numpy(np.stack([present(record.target, record, "target") for record in records]))


def check_label(key: str, label: int | None, classes: int | None, rows: Mapping[int, int] | None = None) -> int:
    """The class in training of a record's label.

    Args:
        key: key of the record, for messages.
        label: its label; None if it has none.
        classes: number of classes; None if unknown.
        rows: class in training of each label; None if they are the same number.

    Raises:
        ConfigError: the record has no label, or its label has no class.
    """
    if label is None:
        raise ConfigError(
            f"loss: cross_entropy expects a label for every group, found none for record {key}; "
            'use `loss="squared_error"`'
        )
    if rows is not None and label in rows:
        return rows[label]
    if rows is not None or not 0 <= label < (classes if classes is not None else label + 1):
        raise ConfigError(
            f"loss: cross_entropy expects labels below {classes}, the classes of the head (or the outputs of an "
            f"encoder without one), found label {label} at record {key}; choose another `head` or `encoder`"
        )
    return label


class _Pieces(Sampler[Any]):  # the loader passes each item on to `Groups.__getitems__`, whatever its type
    def __init__(self, course: Course) -> None:
        self._course = course

    def __iter__(self) -> Iterator[Asked]:
        for position, step, share in self._course.pieces():
            last = share.first + len(share.indices)
            words = stream_seeds(self._course.order.seed, MEMBER, step, last)[share.first :]
            yield Asked(position, step, [Wanted(*pair) for pair in zip(share.indices, words, strict=True)])


def stream(
    artifacts: Artifact | Blend,
    order: Order,
    collate: Collate,
    *,
    start: int,
    stop: int,
    workers: int,
    pin: bool,
    partition: Partition = WHOLE,
) -> Iterator[Batch]:
    """Micro-batches of the steps [start, stop), as `order.shares` lists them.

    Args:
        artifacts: artifacts with the groups.
        order: groups of each step.
        collate: reads and stacks records.
        start: first step, counted from 0.
        stop: step after the last.
        workers: number of processes that read ahead; 0 reads ahead in a thread of this process.
        pin: whether batches are in page-locked memory, so that copies to a GPU overlap with computation.
        partition: this process' part of each step.

    Raises:
        CorruptShard: stored bytes differ from their checksum.
        ConfigError: a label is missing or out of range.
        DatamergeError: the artifact cannot be read.
        RuntimeError: a worker died; see `worker_deaths`.
    """
    course = Course(order, partition, start, stop)
    # Apart, so that the end of one stream does not cancel what another one of the same artifact waits for.
    own = Blend.of(artifacts).only(collate.arrays(), facts=False).apart()
    groups = Groups(own, course, collate.taken)
    loader: DataLoader[Any] = DataLoader(
        groups,
        batch_sampler=_Pieces(course),
        collate_fn=Shipping(collate, senders(workers)) if workers else collate,
        num_workers=workers,
        # Readers keep threads and locks that do not survive a fork.
        multiprocessing_context="spawn" if workers else None,
        worker_init_fn=_ignore_signals,
        # The loader draws a seed for its workers; with its own generator it leaves the global one untouched.
        generator=torch.Generator(),
        pin_memory=pin,
    )
    try:
        for batch in _unpacked(loader, workers, pin) if workers else read_ahead(loader, groups.close):
            if isinstance(batch, DatamergeError):
                raise batch
            yield batch
    finally:
        groups.close()


def _unpacked(loader: DataLoader[Any], workers: int, pin: bool) -> Iterator[Batch | DatamergeError]:
    """Unpack what workers send."""
    others = set(active_children())
    said = False
    try:
        for sent in loader:
            if not isinstance(sent, Parcel):
                yield sent
                continue
            if not said:
                warn(_on_shared_memory(sent, workers))
                said = True
            batch = sent.open()
            yield batch.pin_memory() if pin else batch
    except (KeyboardInterrupt, GeneratorExit):
        _end(set(active_children()) - others)
        raise


@contextmanager
def ended(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """Close the batches, and so end their workers, when the block ends, not when they are garbage-collected."""
    try:
        yield batches
    finally:
        if isinstance(batches, Generator):
            batches.close()


@contextmanager
def worker_deaths() -> Iterator[None]:
    """Turn the death of a data worker into a one-line error.

    Torch raises it in a signal handler, so anywhere in the block and not only in `stream`.

    Raises:
        DatamergeError: a data worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in first_line(error):
            raise
        raise DatamergeError(
            f"data_workers: {first_line(error).partition('. ')[0].rstrip('.')}; each worker needs memory for its "
            "imports and two batches: use fewer `data_workers` or a smaller `batch_size`, and run the same command "
            "again"
        ) from error


def _end(workers: Collection[BaseProcess]) -> None:
    """Kill workers: they ignore milder signals, and one that waits for a disk would delay the end."""
    if threading.current_thread() is not threading.main_thread():
        return
    # Torch's SIGCHLD handler would report their end as a crash.
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in workers:
        worker.kill()
    for worker in workers:
        worker.join()
    signal.signal(signal.SIGCHLD, handler)


def _on_shared_memory(parcel: Parcel, workers: int) -> str:
    needed = parcel.tensors * (senders(workers) * LOADERS + 1)
    return (
        f"data_workers: expected {needed / 2**20:.0f} MB free in {SHARED_MEMORY} for {workers} workers, found "
        f"{parcel.free / 2**20:.0f} MB; batches go through pipes, which is slower. Give the container more shared "
        f"memory (docker run --shm-size={-(-needed * 2 // 2**30)}g), or use `data_workers=0`"
    )


def _ignore_signals(worker: int) -> None:
    # Ctrl-C reaches the whole process group. The main process decides when to stop and then ends its workers; a
    # worker that died on its own would turn an orderly stop into an error.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
