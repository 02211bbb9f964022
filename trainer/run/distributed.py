"""The processes of a run: one alone, several under torchrun, or the workers of Ray Train.

Gradients are exchanged once a step (`trainer.run.exchange`). There is no DistributedDataParallel wrapper: its hooks
fire during every backward pass, and the curvature estimators differentiate twice. The same exchange carries the
numbers all processes must agree on (loss, stop request, non-finite values), so they leave the loop at the same step.

Only the sums of GPUs' tensors go through NCCL, everything else through gloo. gloo raises at once when a peer is gone.
NCCL waits for it, so nobody waits for a sum before a sign of life of all over gloo, and then for `EXCHANGE_SECONDS`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from datamerge.runtime.messages import first_line, warn
from storage_schemas import ConfigError, DatamergeError

T = TypeVar("T")

SLURM_TASK = "SLURM_PROCID"  # in every task of a step
BACKENDS = "cpu:gloo,cuda:nccl"
# A GPU is never more than some thousand kernels behind its process, and all processes are there when this begins.
EXCHANGE_SECONDS = 20.0
LOOK_SECONDS = 0.0002
# As long as NCCL may take to give up what other processes will never take part in.
ABORT_SECONDS = 5.0
# Sums begin before all processes are there, and may wait for so long; gloo raises then.
LATE = timedelta(minutes=30)
# What NCCL reads when it starts, at the first sum, where the user has not set it: a switch between GPUs would add in
# any order, for which torch too turns this off where it is told to use deterministic algorithms.
NCCL = {"NCCL_NVLS_ENABLE": "0"}
# What torch reads when the processes are joined: its watchdog would end a process, with an abort and its own words,
# before `Processes.wait` meets the error that NCCL has noticed and says it in a line.
NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class Work(Protocol):
    """What torch.distributed hands out for a sum that was begun; not importable where torch is built without it."""

    def is_completed(self) -> bool: ...

    def wait(self, timeout: timedelta = ..., /) -> object: ...


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: counted from 0; process 0 writes everything that is written.
        world: how many there are.
        local_rank: counted on this machine; which GPU is ours.
        patience: seconds that a sum may take once all processes have come to it; None where the transport itself
            notices a dead peer.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    patience: float | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def take_gpu(self) -> torch.device:
        """The GPU of this process among those that it sees, made the current one.

        Raises:
            ConfigError: more processes than GPUs, where there are several.
        """
        count = torch.cuda.device_count()
        index = 0 if count == 1 else self.local_rank  # Slurm and MPI can show each process its own, and all call it 0
        if index >= count:
            raise ConfigError(
                f"device: expected a GPU for each process, found {count} on this machine; start at most as many "
                "processes there"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def start_sum(self, flat: Tensor) -> Work:
        """Begin to sum a tensor in place over all processes, which all begin the same sums in the same order.

        Raises:
            DatamergeError: another process has died.
        """
        with _peers():
            return cast(Work, dist.all_reduce(flat, async_op=True))

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor in place over all processes, and return it; raises as `wait`."""
        if self.world > 1:
            self.meet()
            self.wait([self.start_sum(tensor)])
        return tensor

    def meet(self) -> None:
        """Wait for the slowest process where the transport of sums would not notice a dead one; raises as `wait`."""
        if self.patience is not None:
            with _peers():
                dist.all_reduce(torch.zeros(1))

    def wait(self, sums: Sequence[Work]) -> None:
        """Wait for sums that all processes have begun, or are about to.

        Raises:
            DatamergeError: another process has died, or does not come.
        """
        with _peers():
            if self.patience is not None:
                end = time.monotonic() + self.patience
                while not all(work.is_completed() for work in sums):
                    if time.monotonic() > end:
                        raise RuntimeError(f"no sum after {self.patience:g} s")
                    time.sleep(LOOK_SECONDS)
            for work in sums:
                if self.patience is None:
                    work.wait()
                else:  # with a limit any torch raises what NCCL has met; without one it may leave that to the GPU
                    work.wait(timedelta(seconds=self.patience))

    def gather(self, value: T) -> list[T]:
        """The value of every process, by rank; raises as `wait`."""
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


def is_first() -> bool:
    """Whether this process is the first of those that torchrun started, or was started by itself.

    Known outside `processes` too, where they are no longer joined.
    """
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes this one was started with; joins them unless they are joined already (as Ray Train does).

    Args:
        device: setting of that name; decides between gloo and nccl.

    Raises:
        ConfigError: torchrun's variables are incomplete.
    """
    if dist.is_available() and dist.is_initialized():
        _set(NCCL)
        own = Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", "0")))
        yield replace(own, patience=EXCHANGE_SECONDS if dist.get_backend_config() == BACKENDS else None)
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
    if device == "cpu" or not torch.cuda.is_available():
        with _peers():
            dist.init_process_group("gloo")
        try:
            yield own
        finally:
            dist.destroy_process_group()
        return
    if device not in ("auto", "cuda"):
        raise ConfigError(f"device: expected auto or cuda for several, found {device}")
    gpu = own.take_gpu()  # NCCL exchanges through the current one, which is the same for all until it is set
    _set(NCCL | NO_WATCHDOG)
    with _peers():
        dist.init_process_group(BACKENDS, timeout=LATE)
    try:
        own = replace(own, patience=EXCHANGE_SECONDS)
        _check_gpus_apart(own)
        yield own
    except BaseException:
        # Leaving NCCL in order takes all processes, and after an error some may be waiting elsewhere, or gone.
        _abort(gpu)
        raise
    dist.destroy_process_group()


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _abort(gpu: torch.device) -> None:
    """Give up all sums on a GPU. What that raises or waits for, too long for a run that has failed, is left alone."""

    def abort() -> None:
        torch.cuda.set_device(gpu)  # a thread's own is the first one, where it would take memory
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()

    ending = threading.Thread(target=abort, daemon=True)
    ending.start()
    ending.join(ABORT_SECONDS)


def _check_gpus_apart(own: Processes) -> None:
    """Raises ConfigError, in all processes, where two take one GPU, which NCCL would refuse in its own words."""
    taken = own.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    if len(set(taken)) < own.world:
        first, second = next((taken.index(one), i) for i, one in enumerate(taken) if taken.index(one) < i)
        raise ConfigError(
            f"device: expected a GPU for each process, found processes {first} and {second} on the same one; show "
            "each its own in CUDA_VISIBLE_DEVICES, or start at most as many processes as GPUs"
        )


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
