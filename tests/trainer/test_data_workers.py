"""Data workers: little shared memory, killed workers, failing disks, and a second Ctrl-C."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.data.stream
from storage_schemas import Artifact, CorruptShard, DatamergeError, open_artifact
from tests.support.refusals import refused
from trainer.data.order import Order
from trainer.data.shipping import Parcel, Shipping, free_shared_memory
from trainer.data.stream import Collate, Groups, Wanted, ended, stream, worker_deaths

MakeArtifact = Callable[..., str]
COLLATE = Collate("avg", labels=False, members=1)


def _stream(path: str, workers: int) -> Any:
    artifact = open_artifact(path)
    order = Order(artifact.shard_sizes, 4, 0)
    return stream(artifact, order, COLLATE, start=0, stop=50, workers=workers, pin=False)


@pytest.mark.parametrize(("free", "packed"), [(0, True), (10**12, False), (None, False)])
def test_batches_that_do_not_fit_into_shared_memory_go_through_a_pipe(
    free: int | None, packed: bool, make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.shipping.free_shared_memory", lambda: free)
    items = [Groups(open_artifact(make_artifact()))[Wanted(0, 0)]]
    plain, sent = COLLATE(items), Shipping(COLLATE, 2)(items)
    assert isinstance(sent, Parcel) is packed
    batch = sent.open() if isinstance(sent, Parcel) else sent
    assert not isinstance(plain, DatamergeError)
    assert not isinstance(batch, DatamergeError)
    for name, value in plain.content().items():
        found = batch.content()[name]
        assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found


def test_errors_are_sent_unchanged() -> None:
    error = CorruptShard("x")
    assert Shipping(lambda items: error, 1)([]) is error


def test_free_shared_memory_is_that_of_this_machine() -> None:
    found = os.statvfs("/dev/shm")
    assert free_shared_memory() == pytest.approx(found.f_bavail * found.f_frsize, rel=0.5)


def test_little_shared_memory_and_a_killed_worker_are_one_message_each(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_artifact()
    expected = next(_stream(path, 0))
    monkeypatch.setattr(trainer.data.stream, "senders", lambda workers: 10**15)
    with (
        refused(DatamergeError, None, "data_workers", "DataLoader worker"),
        worker_deaths(),
        ended(_stream(path, 1)) as batches,
    ):
        first = next(batches)
        assert (first.keys, torch.equal(first.target, expected.target)) == (expected.keys, True)
        (worker,) = active_children()
        worker.kill()
        time.sleep(60)  # torch raises the error inside this call
    assert active_children() == []
    assert capsys.readouterr().err.count("--shm-size=") == 1


def test_a_read_error_names_the_artifact_and_the_cause(
    make_artifact: MakeArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(artifact: Artifact, position: int, offset: int, rows: Any) -> Any:
        raise OSError(errno.EIO, "Input/output error")

    path = make_artifact()
    monkeypatch.setattr(Artifact, "read", fail)
    with refused(DatamergeError, None, path, "Input/output error"):
        next(_stream(path, 0))


STUCK = """
import os, signal, sys, threading, time
from trainer import TrainConfig, train
import trainer.run.update

def slow(*arguments):
    print("stepping", flush=True)
    time.sleep(1000)

if __name__ == "__main__":
    trainer.run.update.Optimisation.step = slow
    train(TrainConfig(artifact=sys.argv[1], run=sys.argv[2], steps=4, batch_size=4, data_workers=1))
"""


def test_a_second_ctrl_c_stops_at_once(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """In the middle of a step that does not end."""
    (tmp_path / "stuck.py").write_text(STUCK)
    command = [sys.executable, str(tmp_path / "stuck.py"), make_artifact(), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "stepping\n"
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - started < 15
    assert "once more to stop at once" in errors
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
