"""The processes of one training run, real ones over gloo.

They are forked from a server that has imported torch and the trainer, which takes each process seconds otherwise.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_FORKS = multiprocessing.get_context("forkserver")


def launch(world: int, entries: Sequence[Mapping[str, Any]], folder: Path) -> list[tuple[int, str]]:
    """Run training configurations, one after the other, in `world` processes.

    Each process prints the keys of the records that it is handed. An entry's `trouble` is a signal that process `who`
    sends itself when it is handed micro-batch `at` of the sitting.

    Args:
        world: number of processes.
        entries: settings of `TrainConfig`, and perhaps `trouble`.
        folder: for what the processes print.

    Returns:
        Exit code and stderr of each rank.
    """
    return _run(world, folder, _sit, entries)


def exchange(world: int, folder: Path, patience: float, absent: bool) -> list[tuple[int, str]]:
    """Sum tensors once in `world` processes.

    Args:
        world: number of processes.
        folder: for what the processes print: the sums, or the error and the seconds until it.
        patience: of `Processes`.
        absent: the last process gives the sign of life, and then waits for process 0 to end.

    Returns:
        Exit code and stderr of each rank.
    """
    return _run(world, folder, _sum, patience, absent)


def _run(world: int, folder: Path, work: Callable[..., None], *arguments: Any) -> list[tuple[int, str]]:
    """`work(environment, file for what is said, *arguments)` in each process."""
    _FORKS.set_forkserver_preload(["trainer.run.job", "torch.distributed"])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    said = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [
        _FORKS.Process(
            target=work, args=(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, said[rank], *arguments)
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode is not None, "waited in vain"
    return [(process.exitcode or 0, file.read_text()) for process, file in zip(ranks, said, strict=True)]


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _joined(environment: dict[str, str], said: Path) -> Iterator[None]:
    """This process is one of those over gloo, and what it says goes to a file."""
    import torch.distributed

    os.environ.update(environment)
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.distributed.init_process_group("gloo")
    yield
    # Else threads of gloo may be alive when the process ends, which C++ answers with an abort.
    torch.distributed.destroy_process_group()


def _sit(environment: dict[str, str], said: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """One process's part in all the runs."""
    with _joined(environment, said):
        for entry in entries:
            _train(dict(entry))


def _sum(environment: dict[str, str], said: Path, patience: float, absent: bool) -> None:
    import torch

    from storage_schemas import DatamergeError
    from trainer.run.distributed import Processes

    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    ended = said.with_name("ended")
    with _joined(environment, said):
        if absent and rank == world - 1:
            torch.distributed.all_reduce(torch.zeros(1))
            while not ended.exists():
                time.sleep(0.01)
            return
        tensors = [torch.full((2,), rank + 1.0), torch.full((1,), 10.0 * (rank + 1))]
        started = time.monotonic()
        try:
            numbers = Processes(rank, world, rank, patience).sum(tensors, torch.tensor([rank + 2.0]))
        except DatamergeError as error:
            _tell(f"ERROR {error} AFTER {time.monotonic() - started}")
            ended.touch()
            return
        _tell(json.dumps({"tensors": [tensor.tolist() for tensor in tensors], "numbers": numbers.tolist()}))


def _train(entry: dict[str, Any]) -> None:
    import trainer.data.stream
    import trainer.run.job
    from storage_schemas import DatamergeError
    from trainer import Stopped, TrainConfig, train

    trouble = entry.pop("trouble", None)
    original = trainer.data.stream.stream

    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(*arguments, **options)):
            _tell(f"RECORDS {json.dumps(batch.keys)}")
            if trouble and number == trouble["at"] and int(os.environ["RANK"]) == trouble["who"]:
                signal.raise_signal(trouble["signal"])
            yield batch

    trainer.run.job.stream = stream  # type: ignore[attr-defined]
    try:
        train(TrainConfig(**entry))
    except Stopped as stopped:
        _tell(f"STOPPED {stopped}")
    except DatamergeError as error:
        _tell(f"ERROR {error}")


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
