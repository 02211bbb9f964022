"""Ctrl-C while the server does not answer: the command ends, and the same command continues."""

from __future__ import annotations

import bisect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_schemas import open_artifact
from tests.support.servers import WebServer
from trainer import TrainConfig, train
from trainer.data.order import Order

SHAPE, ENCODER = (1, 128, 128), "mlp:1x128x128-2-6"
SETTINGS: dict[str, Any] = {
    "batch_size": 1,
    "steps": 10,
    "learning_rate": 1e-2,
    "log_every": 1,
    "threads": 1,
    "seed": 0,
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_ctrl_c_ends_a_run_that_waits_for_a_silent_server(
    tmp_path: Path, web: WebServer, make_artifact: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    """One shard of three is never sent: the commands wait after some steps, which are kept."""
    local, url = make_artifact(name="web/a", shape=SHAPE, encoder=ENCODER), f"{web.url}/a"
    train(TrainConfig(artifact=local, run=str(tmp_path / "local"), **SETTINGS))
    sizes, go = open_artifact(local).shard_sizes, threading.Event()
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    shards = [bisect.bisect(ends, index) for index in Order(sizes, 1, 0).batches_joined(0, 10).tolist()]
    silent = next(shard for shard in shards if shard != shards[0])
    steps = shards.index(silent)

    def hold(method: str, path: str) -> None:
        if f"/shards/{silent:05d}.tar" in path:
            go.wait(60)

    web.fault = hold
    commands: list[tuple[Path, str, subprocess.Popen[str]]] = []
    for cache in ("none", str(tmp_path / "cache")):
        run = tmp_path / f"run-{len(commands)}"
        command = [sys.executable, "-m", "datamerge", "train", url, str(run), "--cache", cache, *FLAGS]
        # Each has its own process group, as a terminal makes it.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
        request.addfinalizer(process.kill)
        commands.append((run, cache, process))
    for run, _, process in commands:
        while not (run / "log.jsonl").exists() or len(_losses(run)) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
    for run, _, process in commands:
        # The server is still silent: the processes must end with all their threads before it answers.
        _, said = process.communicate(timeout=40)
        assert process.returncode == 130, said
        assert "Traceback" not in said
        (checkpoint,) = (run / "checkpoints").iterdir()
        last = said.splitlines()[-1]
        assert f"step {steps} of 10" in last
        assert str(checkpoint) in last
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    go.set()
    for run, cache, _ in commands:
        train(TrainConfig(artifact=url, run=str(run), cache=cache, **SETTINGS))
        assert _losses(run) == _losses(tmp_path / "local")
