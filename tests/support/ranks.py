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
from collections.abc import Iterator, Mapping, Sequence
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
    _FORKS.set_forkserver_preload(["trainer.run.job", "torch.distributed"])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_port()),
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    said = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [
        _FORKS.Process(target=_sit, args=(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, entries, said[rank]))
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


def _sit(environment: dict[str, str], entries: Sequence[Mapping[str, Any]], said: Path) -> None:
    """One process's part in all the runs."""
    import torch.distributed

    os.environ.update(environment)
    with said.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.distributed.init_process_group("gloo")
    for entry in entries:
        _train(dict(entry))
    # Else threads of gloo may be alive when the process ends, which C++ answers with an abort.
    torch.distributed.destroy_process_group()


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
