"""Sums of gradients over several GPUs, and processes that fail; on one GPU, NCCL with a single process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.support.paths import ROOT
from tests.support.ranks import free_port

# One process of a run; its arguments are HOW and DEVICE.
SCRIPT = """
import os, sys, time, torch
import torch.distributed as dist
import trainer.run.exchange
from trainer.run.distributed import BACKENDS, EXCHANGE_SECONDS, Processes, _abort, processes

how, device = sys.argv[1:]
trainer.run.exchange.BUCKET_BYTES = 20_000  # of a layer's 16,640, so each is a bucket

def exchanged(own, processes):
    torch.manual_seed(0)
    network = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4))).to(device)
    images = torch.rand(8, 64).to(device)
    parameters = list(network.parameters())
    expected = torch.autograd.grad(network(images).square().sum(), parameters)
    exchange = trainer.run.exchange.Exchange(own, parameters)
    assert len(exchange.buckets) == 4
    for _ in range(2):
        network.zero_grad(set_to_none=True)
        with exchange.sending(True):
            network(images[own.rank :: processes]).square().sum().backward()
            assert len(exchange._sent) == 3
        one, *used = exchange.finish(torch.ones(1, device=device)).tolist()
        assert one == processes and used == [processes] * len(parameters), (one, used)
        for parameter, gradient in zip(parameters, expected):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-4)

if how == "alone":
    dist.init_process_group(BACKENDS if device == "cuda" else "gloo")
    own = Processes(0, 2, 0, EXCHANGE_SECONDS)
    exchanged(own, 1)
    assert own.sum(torch.ones(2, device=device)).tolist() == [1, 1]
    if device == "cuda":
        started = time.monotonic()
        _abort(torch.device("cuda", 0))
        assert not dist.is_initialized()
        assert time.monotonic() - started < 4, "NCCL does not give up in time"
    sys.exit()
with processes(device) as own:
    exchanged(own, 2)
    assert own.gather(own.rank) == [0, 1]
    if own.first and how == "fails":
        raise KeyError("mine")
    if own.first and how == "dies":
        os._exit(9)
    if how != "ends":
        own.sum(torch.ones(1, device=device))
"""


def _run(folder: Path, how: str, device: torch.device, world: int) -> list[tuple[int, str]]:
    """Exit code and stderr of each process."""
    script = folder / "sums.py"
    script.write_text(SCRIPT)
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    shared = {**os.environ, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), how, device.type],
            env={**shared, "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, errors, strict=True)]


@pytest.mark.usefixtures("several_processes")
@pytest.mark.parametrize("how", ["ends", "fails", "dies"])
def test_sums_and_failures(tmp_path: Path, device: torch.device, how: str) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    started = time.monotonic()
    first, second = _run(tmp_path, how, device, 2)
    if device.type == "cuda":  # 30 s, and the time to start
        assert time.monotonic() - started < 60
    assert (first[0], second[0]) == {"ends": (0, 0), "fails": (1, 1), "dies": (9, 1)}[how], (first, second)
    if how != "ends":
        assert "lost contact with the other processes of this run" in second[1]


def test_a_single_process_sums_gradients_and_aborts(tmp_path: Path, device: torch.device) -> None:
    ((code, errors),) = _run(tmp_path, "alone", device, 1)
    assert code == 0, errors
