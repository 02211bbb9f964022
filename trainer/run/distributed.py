"""The processes of a run: a single one, several under torchrun, or the workers of Ray Train.

Gradients are exchanged once a step (`trainer.run.exchange`). There is no DistributedDataParallel wrapper: its hooks
fire during every backward pass, and the curvature estimators differentiate twice. The same exchange carries the
numbers all processes must agree on (loss, stop request, non-finite values), so they leave the loop at the same step.

Sums of GPU tensors go through NCCL, everything else through gloo. gloo raises at once when a peer is gone; NCCL would
wait for it. So processes first meet over gloo, and then wait for a sum for at most `EXCHANGE_SECONDS`.
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

SLURM_TASK = "SLURM_PROCID"  # environment variable that Slurm sets in every task of a step
BACKENDS = "cpu:gloo,cuda:nccl"
# All processes have met when this wait begins, and a GPU lags behind its process by a few thousand kernels at most.
EXCHANGE_SECONDS = 20.0
LOOK_SECONDS = 0.0002
# Time for NCCL to abort sums that other processes will never join.
ABORT_SECONDS = 5.0
# Timeout of gloo and NCCL operations, since sums may begin before all processes have arrived.
LATE = timedelta(minutes=30)
# Environment variables that NCCL reads at the first sum, unless the user has set them. NVLink SHARP adds in any
# order; torch disables it too when it is set to use deterministic algorithms.
NCCL = {"NCCL_NVLS_ENABLE": "0"}
# Environment variables that torch reads when it joins the processes. Its watchdog would abort a process before
# `Processes.wait` could report NCCL's error in one line.
NO_WATCHDOG = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class Work(Protocol):
    """Handle of an asynchronous sum; torch's own type cannot be imported if torch is built without distributed."""

    def is_completed(self) -> bool: ...

    def wait(self, timeout: timedelta = ..., /) -> object: ...


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: number of this process, from 0; process 0 writes all files.
        world: number of processes.
        local_rank: number of this process on its machine, from 0; it takes the GPU of that number.
        patience: seconds to wait for a sum once all processes have joined it; None if the transport itself notices
            a dead peer.
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
        """Select a GPU for this process and make it the current device.

        Raises:
            ConfigError: this machine has fewer GPUs than processes.
        """
        count = torch.cuda.device_count()
        index = 0 if count == 1 else self.local_rank  # Slurm and MPI may show each process a single GPU
        if index >= count:
            raise ConfigError(
                f"device: expected a GPU for each process, found {count} on this machine; start at most as many "
                "processes there"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)

    def start_sum(self, flat: Tensor) -> Work:
        """Begin to sum a tensor in place over all processes, which must begin the same sums in the same order.

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
        """Wait for all processes if the transport of sums does not notice a dead one; raises as `wait`."""
        if self.patience is not None:
            with _peers():
                dist.all_reduce(torch.zeros(1))

    def wait(self, sums: Sequence[Work]) -> None:
        """Wait for sums that all processes have begun, or are about to begin.

        Raises:
            DatamergeError: another process has died, or takes longer than `patience`.
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
                else:  # with a timeout every torch version raises NCCL's errors; without one some do not
                    work.wait(timedelta(seconds=self.patience))

    def gather(self, value: T) -> list[T]:
        """Values of all processes, by rank; raises as `wait`."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        with _peers():
            dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """Call a function in every process; if it fails in one of them, it fails in all.

        Raises:
            DatamergeError: this process' own error, or else that of the first process that failed.
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
        """Call a function in process 0 while the others wait and get None; raises as `together`."""
        return self.together(lambda: work() if self.first else None)


def is_first() -> bool:
    """Whether this is the first process that torchrun started, or the only one; valid outside `processes` too."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes of this run, unless they are joined already (as under Ray Train).

    Args:
        device: the setting of that name; decides between gloo and NCCL.

    Raises:
        ConfigError: torchrun's environment variables are incomplete, or several processes cannot use the device.
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
        raise ConfigError(
            f"device: expected auto, cpu or cuda for several processes, found {device}; set one of these"
        )
    gpu = own.take_gpu()  # NCCL uses the current device, which is GPU 0 in every process until it is set
    _set(NCCL | NO_WATCHDOG)
    with _peers():
        dist.init_process_group(BACKENDS, timeout=LATE)
    try:
        own = replace(own, patience=EXCHANGE_SECONDS)
        _check_gpus_apart(own)
        yield own
    except BaseException:
        # An orderly shutdown of NCCL needs all processes; after an error some may wait elsewhere or be gone.
        _abort(gpu)
        raise
    dist.destroy_process_group()


def _set(variables: dict[str, str]) -> None:
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def _abort(gpu: torch.device) -> None:
    """Abort all sums on a GPU, ignoring errors, and wait for that at most `ABORT_SECONDS`."""

    def abort() -> None:
        torch.cuda.set_device(gpu)  # a new thread's current device is GPU 0, where it would allocate memory
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()

    ending = threading.Thread(target=abort, daemon=True)
    ending.start()
    ending.join(ABORT_SECONDS)


def _check_gpus_apart(own: Processes) -> None:
    """Refuse, in all processes, to let two processes share a GPU; NCCL's own error does not explain it.

    Raises:
        ConfigError: two processes have the same GPU.
    """
    taken = own.gather(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
    if len(set(taken)) < own.world:
        first, second = next((taken.index(one), i) for i, one in enumerate(taken) if taken.index(one) < i)
        raise ConfigError(
            f"device: expected a GPU for each process, found processes {first} and {second} on the same one; set "
            "CUDA_VISIBLE_DEVICES to another GPU for each, or start at most as many processes as GPUs"
        )


def _say_alone() -> None:
    """Warn once that the tasks of a Slurm step train independently; this may be intended."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks.isdigit() and int(tasks) > 1 and "WORLD_SIZE" not in os.environ and os.environ.get(SLURM_TASK) == "0":
        warn(
            f"each of the {tasks} Slurm tasks trains alone: to train one run together, start torchrun in one task "
            "per node, or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
        )


@contextmanager
def _peers() -> Iterator[None]:
    """Turn the transport's error about a lost peer into a one-line DatamergeError."""
    try:
        yield
    except RuntimeError as error:
        raise DatamergeError(
            f"lost contact with the other processes of this run ({first_line(error)[:160]}); their output says why; "
            "the same command continues from the newest checkpoint"
        ) from error
