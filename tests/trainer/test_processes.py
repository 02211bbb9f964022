"""Several processes, real ones over gloo: curves, orders, interruptions and deaths."""

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
    """The same run but for the order in which float32 numbers were added."""
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


def test_every_layout_has_the_same_curve(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """10 groups in batches of 4: the last batch leaves some processes with nothing."""
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
    """1 → 2 → 3 → 1 processes, each sitting but the last ended by a signal to one of its processes.

    10 groups in batches of 6 and 4: no share is empty, so each process is handed something in every step.
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
        handed = [[json.loads(keys) for keys in re.findall("RECORDS (.*)", text)] for _, text in outcomes]
        seen += [[key for share in shares for key in share] for shares in zip(*handed, strict=True)]
    stored = open_artifact(artifact)
    order = Order(stored.shard_sizes, 6, 0)
    assert seen == [[stored[index].key for index in order.batch(step).tolist()] for step in range(7)]
    _train(entry)
    _assert_close(tmp_path / "whole", tmp_path / "moved")


def test_a_killed_process_ends_the_run_which_then_continues(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    _train(_entry(artifact, tmp_path / "whole"))
    entry = _entry(artifact, tmp_path / "killed", checkpoint_every=2)
    first, second = launch(2, [{**entry, "trouble": {"at": 5, "who": 1, "signal": 9}}], tmp_path)
    assert second[0] == -signal.SIGKILL
    assert re.search(r"ERROR lost contact with the other processes of this run .*newest checkpoint", first[1])
    _train(entry)
    _assert_close(tmp_path / "whole", tmp_path / "killed")


def test_what_fails_in_one_process_fails_in_all(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    entries = [
        _entry(make_artifact(huge="k6"), tmp_path / "run"),
        _entry(make_artifact(name="other"), tmp_path / "few", batch_size=1),
    ]
    for _, text in launch(2, entries, tmp_path):
        assert re.search(r"ERROR step \d: .*loss.* inf .*k6;", text)
        assert re.search(r"ERROR batch_size: .*2 groups.*2 processes.*`batch_size=2`", text)


def test_torchrun_starts_it(make_artifact: MakeArtifact, tmp_path: Path) -> None:
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


def test_half_an_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with refused(ConfigError, None, "WORLD_SIZE", "2", "RANK", "LOCAL_RANK"), processes("cpu"):
        pass


VARIABLES = ("NCCL_NVLS_ENABLE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")


class Gpus:
    """What a machine with GPUs, and torch.distributed on it, would be asked; joins no processes.

    Attributes:
        calls: in their order.
        taken: the GPU of each process.
        told: what NCCL and torch find in the environment when processes are joined.
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
        self.told = {name: os.environ.get(name) for name in VARIABLES}


def test_each_process_takes_its_gpu_before_the_first_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL exchanges through the current GPU, which is the first in every process until somebody sets it."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with processes("auto") as own:
        assert gpus.calls == [("set_device", 1), ("init", "cpu:gloo,cuda:nccl")]
        assert own.patience is not None
        assert own.patience + ABORT_SECONDS < 30
    assert gpus.calls[2:] == [("destroy", None)]
    with refused(ConfigError, "device", "auto", "cuda:0"), processes("cuda:0"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "2")
    with refused(ConfigError, "device", "GPU", "2"), processes("cuda"):
        pass


def test_an_error_leaves_the_other_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """To leave NCCL in order takes all processes; those that wait for a sum will never come."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="1", LOCAL_RANK="1")
    with pytest.raises(KeyError), processes("auto"):
        raise KeyError
    # The second time in the thread that gives up: torch's current GPU is one of a thread's.
    assert gpus.calls == [
        ("set_device", 1),
        ("init", "cpu:gloo,cuda:nccl"),
        ("set_device", torch.device("cuda", 1)),
        ("abort", None),
    ]


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_an_abort_that_does_not_come_to_an_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
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


def test_torch_ends_no_process_by_itself_and_switches_add_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch (`ProcessGroupNCCL`) and NCCL read; the user's own values stay."""
    gpus = Gpus(monkeypatch, 2, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0")
    with processes("auto"):
        assert gpus.told == {"NCCL_NVLS_ENABLE": "0", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    with processes("auto"):
        assert gpus.told == {"NCCL_NVLS_ENABLE": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}


def test_processes_that_see_one_gpu_each_are_told_from_those_that_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_the_gpu_of_a_process(
    monkeypatch: pytest.MonkeyPatch, gpus: int, local_rank: int, expected: int | None
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.cuda.set_device", lambda index: None)
    own = Processes(rank=local_rank, world=4, local_rank=local_rank)
    if expected is None:
        with refused(ConfigError, "device", f"found {gpus}"):
            own.take_gpu()
    else:
        assert own.take_gpu() == torch.device("cuda", expected)


def test_a_sum_over_a_transport_that_waits_for_ever(tmp_path: Path) -> None:
    """NCCL's, in place of which stands gloo: process 1 gives a sign of life, and then never comes to the sum."""
    ((_, first), (_, second)) = exchange(2, tmp_path, patience=0.5, absent=False)
    assert json.loads(first) == json.loads(second) == {"tensors": [[3.0, 3.0], [30.0]], "numbers": [5.0, 2.0, 2.0]}
    ((code, text), _) = exchange(2, tmp_path, patience=0.5, absent=True)
    assert code == 0, text
    assert re.search(r"ERROR lost contact with the other processes of this run \(no sum after 0.5 s\)", text)
    seconds = float(text.rpartition("AFTER ")[2])
    assert 0.5 <= seconds < 20


def test_what_nccl_has_noticed_is_said_in_a_line() -> None:
    """Its sum counts as completed then, and raises when it is waited for with a limit; without one it may not."""

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
def test_slurm_tasks_that_know_nothing_of_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], environment: dict[str, str], said: bool
) -> None:
    for name in ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with processes("cpu") as own:
        assert own == Processes()
    assert ("each of the 4 Slurm tasks trains alone" in capsys.readouterr().err) is said
