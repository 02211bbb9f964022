"""The processes of a run: one alone, several under torchrun, or the workers of Ray Train.

Gradients are exchanged once a step, summed as one flat tensor, after all micro-batches. There is no
DistributedDataParallel wrapper: its hooks fire during every backward pass, and the curvature estimators
differentiate twice. The same exchange carries the numbers all processes must agree on (loss, stop request,
non-finite values), so they leave the loop at the same step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from datamerge.runtime.messages import first_line, warn
from storage_schemas import ConfigError, DatamergeError

T = TypeVar("T")

SLURM_TASK = "SLURM_PROCID"  # in every task of a step
TORCHRUN = "TORCHELASTIC_RUN_ID"  # in every process of torchrun


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: counted from 0; process 0 writes everything that is written.
        world: how many there are.
        local_rank: counted on this machine; which GPU is ours.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def take_gpu(self) -> torch.device:
        """The GPU of this process among those that it sees, made the current one.

        Raises:
            ConfigError: more processes than GPUs.
        """
        count, index = torch.cuda.device_count(), self.local_rank
        if count == 1 and SLURM_TASK in os.environ and TORCHRUN not in os.environ:
            index = 0  # Slurm shows each task its own, and all call it 0
        if index >= count:
            raise ConfigError(
                f"device: expected a GPU for each process, found {count} on this machine; start at most as many "
                "processes there"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def sum(self, tensors: Sequence[Tensor], numbers: Tensor) -> Tensor:
        """Sum tensors in place over all processes.

        Args:
            tensors: of equal shapes in every process.
            numbers: a vector of further numbers, on the same device.

        Returns:
            The sum of `numbers`.

        Raises:
            DatamergeError: another process has died.
        """
        if self.world == 1:
            return numbers
        flat = torch.cat([*(tensor.reshape(-1) for tensor in tensors), numbers.to(tensors[0].dtype)])
        with _peers():
            dist.all_reduce(flat)
        pieces = flat.split([*(tensor.numel() for tensor in tensors), len(numbers)])
        for tensor, piece in zip(tensors, pieces, strict=False):
            tensor.copy_(piece.view_as(tensor))
        return cast(Tensor, pieces[-1])

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; raises as `sum`."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Do something that may fail in one process alone; if it does in any, it fails in all.

        Raises:
            DatamergeError: of the type and with the message of the first process that failed.
        """
        result: T | None = None
        error: DatamergeError | None = None
        try:
            result = work()
        except DatamergeError as caught:
            error = caught
        failed = [other for other in self.gather(error) if other is not None]
        if error is not None:
            raise error
        if failed:
            raise failed[0]
        return result  # type: ignore[return-value]  # None only where work() returned it

    def first_alone(self, work: Callable[[], T]) -> T | None:
        """Do something in process 0 while the others wait; raises as `together`. None in the others."""
        return self.together(lambda: work() if self.first else None)


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes this one was started with; joins them unless they are joined already (as Ray Train does).

    Args:
        device: setting of that name; decides between gloo and nccl.

    Raises:
        ConfigError: torchrun's variables are incomplete.
    """
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _say_alone()
        yield Processes()
        return
    try:
        own = Processes(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}: expected RANK and LOCAL_RANK beside it, found none "
            f"({error}); start several processes with torchrun"
        ) from None
    gpu = None
    if device != "cpu" and torch.cuda.is_available():
        if device not in ("auto", "cuda"):
            raise ConfigError(f"device: expected auto or cuda for several, found {device}")
        gpu = own.take_gpu()  # NCCL exchanges through the current one, which is the same for all until it is set
    with _peers():
        dist.init_process_group("gloo" if gpu is None else "nccl", device_id=gpu)
    try:
        yield own
    finally:
        dist.destroy_process_group()


def _say_alone() -> None:
    """Warn, once in a Slurm step, that its tasks know nothing of each other; some want to train alone."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1 and "WORLD_SIZE" not in os.environ and os.environ.get(SLURM_TASK) == "0":
        warn(
            f"each of the {tasks} Slurm tasks trains alone: for one run of all start torchrun in one task a node, or "
            "set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )


@contextmanager
def _peers() -> Iterator[None]:
    """What the transport raises when a peer is gone, in one line."""
    try:
        yield
    except RuntimeError as error:
        raise DatamergeError(
            f"lost contact with the other processes of this run ({first_line(error)[:160]}); their output says why; "
            "the same command continues from the newest checkpoint"
        ) from error
