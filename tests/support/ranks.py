"""The processes of a training run: real processes that communicate over gloo.

They are forked from a server that has imported torch and the trainer, which saves each process seconds.
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

    Each process prints the keys of its records. An entry's `trouble` is a signal that process `who` sends itself when
    it receives micro-batch `at`. Its `bucket_bytes` are those of the exchange. With `unordered`, process `who` raises
    an error at the end of backward pass `at`, like a GPU operation without a deterministic kernel.

    Args:
        world: number of processes.
        entries: settings of `TrainConfig`, and optionally the above.
        folder: where the processes' output goes.

    Returns:
        Exit code and stderr of each rank.
    """
    return _run(world, folder, _train_all, entries)


def exchange(world: int, folder: Path, patience: float, absent: bool) -> list[tuple[int, str]]:
    """Sum tensors once in `world` processes.

    Args:
        world: number of processes.
        folder: where the processes' output goes: the sums, or the error and the seconds until it.
        patience: `patience` of `Processes`, in seconds.
        absent: the last process takes part in the first collective call only, then waits for process 0 to end.

    Returns:
        Exit code and stderr of each rank.
    """
    return _run(world, folder, _sum, patience, absent)


def step(world: int, folder: Path, cases: Sequence[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Gradients of a small network, summed by an exchange, in each of several cases; see `step_once`."""
    outcomes = _run(world, folder, _step, cases)
    assert [code for code, _ in outcomes] == [0] * world, outcomes
    return [[json.loads(line) for line in text.splitlines()] for _, text in outcomes]


def fail(world: int, folder: Path, case: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Run a step in processes that join and leave as in a training run, and of which some fail.

    Returns:
        Exit code of each rank, and its error with the seconds from the step to the process's end.
    """
    return _run(world, folder, _fail, case)


def _run(world: int, folder: Path, work: Callable[..., None], *arguments: Any) -> list[tuple[int, str]]:
    """Run `work(environment, output file, *arguments)` in each process."""
    _FORKS.set_forkserver_preload(["trainer.run.job", "torch.distributed"])
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    output = [folder / f"rank-{rank}.txt" for rank in range(world)]
    ranks = [
        _FORKS.Process(
            target=work, args=(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, output[rank], *arguments)
        )
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        assert process.exitcode is not None, "a process did not end within 300 seconds"
    return [(process.exitcode or 0, file.read_text()) for process, file in zip(ranks, output, strict=True)]


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _joined(environment: dict[str, str], output: Path) -> Iterator[None]:
    """Join the gloo process group; stderr goes to a file."""
    import torch.distributed

    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    torch.distributed.init_process_group("gloo")
    yield
    # Otherwise threads of gloo may be alive when the process ends, and C++ aborts.
    torch.distributed.destroy_process_group()


def _train_all(environment: dict[str, str], output: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Run one process's part of all training runs."""
    with _joined(environment, output):
        for entry in entries:
            _train(dict(entry))


def _sum(environment: dict[str, str], output: Path, patience: float, absent: bool) -> None:
    import torch

    from storage_schemas import DatamergeError
    from trainer.run.distributed import Processes
    from trainer.run.exchange import Exchange

    rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    ended = output.with_name("ended")
    with _joined(environment, output):
        if absent and rank == world - 1:
            torch.distributed.all_reduce(torch.zeros(1))
            while not ended.exists():
                time.sleep(0.01)
            return
        tensors = [torch.full((2,), rank + 1.0), torch.full((1,), 10.0 * (rank + 1))]
        parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors]
        for parameter, tensor in zip(parameters, tensors, strict=True):
            parameter.grad = tensor
        started = time.monotonic()
        try:
            numbers = Exchange(Processes(rank, world, rank, patience), parameters).finish(torch.tensor([rank + 2.0]))
        except DatamergeError as error:
            _print(f"ERROR {error} AFTER {time.monotonic() - started}")
            ended.touch()
            return
        _print(json.dumps({"tensors": [tensor.tolist() for tensor in tensors], "numbers": numbers.tolist()}))


def _step(environment: dict[str, str], output: Path, cases: Sequence[Mapping[str, Any]]) -> None:
    with _joined(environment, output):
        for case in cases:
            _print(json.dumps(step_once(int(environment["RANK"]), int(environment["WORLD_SIZE"]), **case)))


def _fail(environment: dict[str, str], output: Path, case: Mapping[str, Any]) -> None:
    from trainer.run.distributed import processes

    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    started, error = 0.0, ""
    try:
        with processes("cpu") as group:
            group.gather(None)
            started = time.monotonic()
            step_once(group.rank, group.world, **case, again=False)
    except Exception as caught:
        error = f"{type(caught).__name__} {caught}"
    _print(f"{error} AFTER {time.monotonic() - started}")


def step_once(
    rank: int,
    world: int,
    shares: Sequence[Sequence[Sequence[int]]],
    bucket_bytes: int,
    breaks: Sequence[int] = (),
    again: bool = True,
) -> dict[str, Any]:
    """One process's part of a step with an exchange, on whole numbers, which float32 adds without rounding.

    Args:
        rank: number of this process.
        world: number of processes.
        shares: indices of the images in each micro-batch of each process.
        bucket_bytes: size of a bucket.
        breaks: processes whose last backward pass fails before the first layer.
        again: repeat such a step; otherwise its error is raised.

    Returns:
        `gradients`, by name; `sums`, those that `Exchange.finish` returns; `events`, in their order.
    """
    import torch
    from torch import Tensor, nn

    import trainer.run.exchange
    from trainer.run.distributed import Processes

    events: list[str] = []

    class Watched(Processes):
        def start_sum(self, flat: Tensor) -> Any:
            events.append(f"sum of {len(flat)}")
            return super().start_sum(flat)

    trainer.run.exchange.BUCKET_BYTES = bucket_bytes
    layers = {"first": nn.Linear(4, 3), "second": nn.Linear(3, 3), "spare": nn.Linear(2, 1), "last": nn.Linear(3, 2)}
    network = nn.ModuleDict(layers)
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).float()
    layers["second"].bias.requires_grad_(False)
    images = torch.randint(0, 4, (8, 4), generator=generator).float()
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    exchange = trainer.run.exchange.Exchange(Watched(rank, world), parameters)

    def backward(numbers: Sequence[int], fail: bool = False) -> None:
        def arrive(gradient: Tensor) -> None:
            if fail:
                raise RuntimeError("broken off")
            events.append("first layer")

        pixels = images[list(numbers)].requires_grad_()
        hidden = layers["first"](pixels)
        outputs = layers["last"](layers["second"](hidden))
        # As in the estimators, the gradient with respect to pixels is part of the loss.
        (slope,) = torch.autograd.grad(outputs.square().sum(), pixels, create_graph=True)
        hidden.register_hook(arrive)
        (outputs.sum() + slope.sum()).backward()

    mine = shares[rank]
    for share in mine:
        last = share is mine[-1]
        try:
            with exchange.sending(last):
                backward(share, fail=last and rank in breaks)
        except RuntimeError:
            if not again:
                raise
            network.zero_grad(set_to_none=True)
            for one in mine:
                backward(one)
    events.append("finish")
    sums = exchange.finish(torch.tensor([float(sum(map(len, mine)))]))
    gradients = {name: p.grad.tolist() for name, p in network.named_parameters() if p.grad is not None}
    return {"gradients": gradients, "sums": sums.tolist(), "events": events}


def _train(entry: dict[str, Any]) -> None:
    import trainer.data.stream
    import trainer.run.exchange
    import trainer.run.job
    import trainer.run.update
    from storage_schemas import DatamergeError
    from trainer import Stopped, TrainConfig, train

    trouble = entry.pop("trouble", None)
    unordered = entry.pop("unordered", None)
    original = trainer.data.stream.stream
    trainer.run.exchange.BUCKET_BYTES = entry.pop("bucket_bytes", 25 * 2**20)
    passes: list[int] = []

    @contextmanager
    def fixed_order(device: Any) -> Iterator[None]:
        yield
        passes.append(1)
        if unordered and len(passes) == unordered["at"] and int(os.environ["RANK"]) == unordered["who"]:
            raise RuntimeError("it does not have a deterministic implementation")

    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(*arguments, **options)):
            _print(f"RECORDS {json.dumps(batch.keys)}")
            if trouble and number == trouble["at"] and int(os.environ["RANK"]) == trouble["who"]:
                signal.raise_signal(trouble["signal"])
            yield batch

    trainer.run.job.stream = stream  # type: ignore[attr-defined]
    trainer.run.update.fixed_order = fixed_order  # type: ignore[attr-defined]
    try:
        train(TrainConfig(**entry))
    except Stopped as stopped:
        _print(f"STOPPED {stopped}")
    except DatamergeError as error:
        _print(f"ERROR {error}")


def _print(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
