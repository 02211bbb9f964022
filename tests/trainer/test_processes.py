"""Runs on several processes, real ones over gloo: losses, orders, interruptions and killed processes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import trainer.run.distributed
from storage_schemas import ConfigError, DatamergeError, open_artifact
from storage_schemas.schema.run import read_summary
from tests.support.ranks import exchange, launch
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.data.order import Order
from trainer.run.distributed import ABORT_SECONDS, Processes, processes

MakeArtifact = Callable[..., str]
STEPS = 9


def _entry(artifact: str, run: Path, **settings: Any) -> dict[str, Any]:
    defaults = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "threads": 1}
    return {"artifact": artifact, "run": str(run), **defaults, **settings}


def _train(entry: Mapping[str, Any]) -> None:
    train(TrainConfig(**entry))


def _losses(run: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def _assert_close(one: Path, other: Path) -> None:
    """Assert that two runs differ at most by the order in which float32 numbers were added."""
    expected = _losses(one)
    assert [step for step, *_ in _losses(other)] == list(range(1, STEPS + 1))
    for mine, theirs in zip(_losses(other), expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    weights = load_file(other / "encoder.safetensors")
    for name, tensor in load_file(one / "encoder.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)


LAYOUTS: dict[str, dict[str, Any]] = {
    "avg": {"gradient_clip": 5.0},
    "sampled": {"estimator": "sampled", "samples": 2},
    "ind": {"arm": "ind"},
    "random": {"arm": "random-member", "ema": 0.9},
}


def test_any_number_of_processes_gives_the_same_losses(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """10 groups in batches of 4: the last batch leaves some processes without groups."""
    artifact = make_artifact()
    for name, settings in LAYOUTS.items():
        _train(_entry(artifact, tmp_path / f"1-{name}", **settings))
        _train(_entry(artifact, tmp_path / f"1x3-{name}", accumulate=3, **settings))
        _assert_close(tmp_path / f"1-{name}", tmp_path / f"1x3-{name}")
    for world, cuts in ((2, [(1, name) for name in LAYOUTS] + [(2, "avg")]), (3, [(1, name) for name in LAYOUTS])):
        runs = {(k, name): tmp_path / f"{world}x{k}-{name}" for k, name in cuts}
        entries = [_entry(artifact, run, accumulate=k, **LAYOUTS[name]) for (k, name), run in runs.items()]
        outcomes = launch(world, entries, tmp_path)
        assert [code for code, _ in outcomes] == [0] * world, outcomes
        for (_, name), run in runs.items():
            _assert_close(tmp_path / f"1-{name}", run)


def test_a_run_moves_between_world_sizes(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """1 → 2 → 3 → 1 processes; all but the last are stopped by a signal to one of them.

    10 groups in batches of 6 and 4: no share is empty, so each process reads groups in every step.
    """
    artifact = make_artifact()
    _train(_entry(artifact, tmp_path / "whole", batch_size=6))
    entry = _entry(artifact, tmp_path / "moved", batch_size=6)
    seen: list[list[str]] = []
    for world, who, count in ((1, 0, 2), (2, 1, 3), (3, 2, 2)):
        outcomes = launch(world, [{**entry, "trouble": {"at": count - 1, "who": who, "signal": 15}}], tmp_path)
        for code, text in outcomes:
            assert code == 0, text
            assert re.search(rf"STOPPED .*step {len(seen) + count} of {STEPS}", text)
        records = [[json.loads(keys) for keys in re.findall("RECORDS (.*)", text)] for _, text in outcomes]
        seen += [[key for share in shares for key in share] for shares in zip(*records, strict=True)]
    stored = open_artifact(artifact)
    order = Order(stored.shard_sizes, 6, 0)
    assert seen == [[stored[index].key for index in order.batch(step).tolist()] for step in range(7)]
    _train(entry)
    _assert_close(tmp_path / "whole", tmp_path / "moved")


def test_a_killed_process_ends_the_run_and_it_can_be_continued(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    _train(_entry(artifact, tmp_path / "whole"))
    entry = _entry(artifact, tmp_path / "killed", checkpoint_every=2)
    first, second = launch(2, [{**entry, "trouble": {"at": 5, "who": 1, "signal": 9}}], tmp_path)
    assert second[0] == -signal.SIGKILL
    assert re.search(r"ERROR lost contact with the other processes of this run .*newest checkpoint", first[1])
    _train(entry)
    _assert_close(tmp_path / "whole", tmp_path / "killed")


def test_an_error_in_one_process_is_raised_in_all(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    entries = [
        _entry(make_artifact(huge="k6"), tmp_path / "run"),
        _entry(make_artifact(name="other"), tmp_path / "few", batch_size=1),
    ]
    for _, text in launch(2, entries, tmp_path):
        assert re.search(r"ERROR step \d: .*loss.* inf .*k6;", text)
        assert re.search(r"ERROR batch_size: .*2 groups.*2 processes.*`batch_size=2`", text)


def test_torchrun_starts_a_run(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    _train(_entry(artifact, tmp_path / "whole"))
    command = (
        f"-m torch.distributed.run --standalone --nproc-per-node 2 -m datamerge train {artifact} {tmp_path / 'run'}"
    )
    flags = f"--steps {STEPS} --batch-size 4 --lr 0.01 --log-every 1"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, *command.split(), *flags.split()], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("finished 9 steps") == 1, time.monotonic() - started
    assert result.stdout == f"{read_summary(tmp_path / 'run').encoder}\n"
    _assert_close(tmp_path / "whole", tmp_path / "run")


def test_an_incomplete_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with refused(ConfigError, None, "WORLD_SIZE", "2", "RANK", "LOCAL_RANK"), processes("cpu"):
        pass


VARIABLES = ("NCCL_NVLS_ENABLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


class Gpus:
    """Replaces torch.cuda and torch.distributed, and records calls; no processes are joined.

    Attributes:
        calls: names of functions and their arguments, in order.
        taken: the GPU of each process.
        environment_at_join: variables for torch and NCCL when processes would be joined.
    """

    def __init__(self, patch: pytest.MonkeyPatch, count: int, **environment: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.taken = [f"GPU-{index}" for index in range(int(environment["WORLD_SIZE"]))]
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: count)
        patch.setattr(torch.cuda, "set_device", lambda index: self.calls.append(("set_device", index)))
        patch.setattr(torch.cuda, "current_device", lambda: self.calls[0][1])
        patch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU"))
        patch.setattr(dist, "init_process_group", self._join)
        patch.setattr(dist, "all_gather_object", lambda values, _: values.__setitem__(slice(None), self.taken))
        patch.setattr(dist, "destroy_process_group", lambda: self.calls.append(("destroy", None)))
        patch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: self.calls.append(("abort", None)))
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in VARIABLES:
            patch.setenv(name, "")  # put back afterwards
            patch.delenv(name)

    def _join(self, backend: str, timeout: Any) -> None:
        self.calls.append(("init", backend))
        self.environment_at_join = {name: os.environ.get(name) for name in VARIABLES}


def test_each_process_takes_its_gpu_before_the_first_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL uses the current GPU, which is the first one in every process until it is set."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with processes("auto") as joined:
        assert gpus.calls == [("set_device", 1), ("init", "cpu:gloo,cuda:nccl")]
        assert joined.patience is not None
        assert joined.patience + ABORT_SECONDS < 30
    assert gpus.calls[2:] == [("destroy", None)]
    with refused(ConfigError, "device", "auto", "cuda:0"), processes("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    with refused(ConfigError, "device", "GPU", "2"), processes("cuda"):
        pass


def test_an_error_aborts_nccl_without_the_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orderly end of NCCL needs all processes, but some may be waiting for a sum."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with pytest.raises(KeyError), processes("auto"):
        raise KeyError
    # It is set again in the thread that aborts: torch's current GPU belongs to a thread.
    assert gpus.calls == [
        ("set_device", 1),
        ("init", "cpu:gloo,cuda:nccl"),
        ("set_device", torch.device("cuda", 1)),
        ("abort", None),
    ]


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_an_abort_that_fails_or_hangs_does_not_hide_the_error(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    monkeypatch.setattr(trainer.run.distributed, "ABORT_SECONDS", 0.05)
    over, entered = threading.Event(), threading.Event()

    def abort() -> None:
        entered.set()
        if fault == "raises":
            raise RuntimeError("ncclUnhandledCudaError")
        over.wait(60)

    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", abort)
    started = time.monotonic()
    try:
        with pytest.raises(KeyError, match="mine"), processes("auto"):
            raise KeyError("mine")
        assert entered.is_set()
        assert time.monotonic() - started < 30
    finally:
        over.set()


def test_variables_of_torch_and_nccl_are_set_unless_the_user_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's watchdog aborts no process, and NVLink SHARP is off; the user's own values are kept."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    with processes("auto"):
        assert gpus.environment_at_join == {"NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    with processes("auto"):
        assert gpus.environment_at_join == {"NCCL_NVLS_ENABLE": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}


def test_processes_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, 1, WORLD_SIZE="3", RANK="2", LOCAL_RANK="2")
    with processes("auto"):
        assert gpus.calls[0] == ("set_device", 0)
    gpus.taken = ["GPU-1", "GPU-0", "GPU-0"]
    gpus.calls.clear()
    with refused(ConfigError, "device", "processes 1 and 2", "CUDA_VISIBLE_DEVICES"), processes("auto"):
        pass
    assert gpus.calls[-1] == ("abort", None)


@pytest.mark.parametrize(
    ("gpus", "local_rank", "expected"), [(4, 3, 3), (1, 3, 0), (2, 2, None)], ids=["each", "its own", "too few"]
)
def test_a_process_takes_the_gpu_of_its_local_rank_or_its_only_one(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_rank: int, expected: int | None
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    joined = Processes(rank=local_rank, world=4, local_rank=local_rank)
    if expected is None:
        with refused(ConfigError, "device", f"found {gpus}"):
            joined.take_gpu()
    else:
        assert joined.take_gpu() == torch.device("cuda", expected)


def test_a_sum_that_a_process_never_joins_times_out(tmp_path: Path) -> None:
    """gloo in place of NCCL, which would wait for ever: process 1 starts and never joins the sum."""
    ((_, first), (_, second)) = exchange(2, tmp_path, patience=0.5, absent=False)
    assert json.loads(first) == json.loads(second) == {"tensors": [[3.0, 3.0], [30.0]], "numbers": [5.0, 2.0, 2.0]}
    ((code, text), _) = exchange(2, tmp_path, patience=0.5, absent=True)
    assert code == 0, text
    assert re.search(r"ERROR lost contact with the other processes of this run \(no sum after 0.5 s\)", text)
    seconds = float(text.rpartition("AFTER ")[2])
    assert 0.5 <= seconds < 20


def test_an_error_of_nccl_is_a_lost_contact() -> None:
    """NCCL's sum then counts as completed; waiting for it with a time limit raises, without one it may not."""

    class Failed:
        def is_completed(self) -> bool:
            return True

        def wait(self, timeout: Any = None) -> bool:
            if timeout is not None:
                raise RuntimeError("NCCL error: remote process exited\nCollective WorkNCCL(SeqNum=3)")
            return True

    with refused(DatamergeError, None, "lost contact", "remote process exited", "newest checkpoint"):
        Processes(world=2, patience=20.0).wait([Failed()])


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, True),
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, False),  # a batch script
        ({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0", "WORLD_SIZE": "1"}, False),
    ],
)
def test_slurm_tasks_that_train_alone_give_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], said: bool
) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with processes("cpu") as joined:
        assert joined == Processes()
    assert ("each of the 4 Slurm tasks trains alone" in capsys.readouterr().err) is said
