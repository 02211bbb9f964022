"""Weights & Biases, offline: the logged rows are read back from its files."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_schemas import ConfigError
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.run.checkpoint import RunFolder

MakeArtifact = Callable[..., str]
BLOCK, FIRST, MIDDLE = 32768, 2, 3


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    defaults = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 2, "wandb_project": "merging"}
    return TrainConfig(artifact=artifact, run=str(run), **{**defaults, **settings})


def test_a_missing_package_is_named_before_anything_is_written(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact()
    # W&B leaves a folder `wandb` where it ran, which is not the package.
    (tmp_path / "elsewhere/wandb").mkdir(parents=True)
    without = [path for path in sys.path if not (Path(path) / "wandb").is_dir()]
    monkeypatch.setattr(sys, "path", [str(tmp_path / "elsewhere"), *without])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with refused(ConfigError, "wandb_project", "pip install 'datamerge[wandb]'"):
        train(_config(artifact, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_wandb_gets_the_rows_of_the_log_in_one_run(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first training fails before its summary is written; the second continues from the checkpoint of step 4."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = _config(make_artifact(), tmp_path / "run", checkpoint_every=4)

    def die(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", die)
        with pytest.raises(MemoryError):
            train(config)
    train(config)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    files = sorted((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    first, second = (_whole_history(file, 6) for file in files)
    assert [row["step"] for row in first] == [2, 4, 6]
    assert [row["step"] for row in second] == [6]
    for row, line in zip([*first[:2], *second], lines, strict=True):
        del line["epoch"]
        assert {name: row[name] for name in line} == line


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs the package wandb")
def test_a_run_continues_after_an_error_of_wandb(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")

    def lost(*arguments: Any) -> None:
        raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb.Run, "log", lost)
    train(_config(make_artifact(), tmp_path / "run"))
    assert capsys.readouterr().err.count("W&B failed (Connection lost)") == 1
    assert (tmp_path / "run/run.json").exists()


def _whole_history(file: Path, last: int) -> list[dict[str, float]]:
    """The logged rows, once the row of step `last` is in the file: W&B's own process may write it after `finish`."""
    end = time.monotonic() + 20
    while not (rows := _history(file)) or rows[-1]["step"] != last:
        assert time.monotonic() < end, rows
        time.sleep(0.05)
    return rows


def _history(file: Path) -> list[dict[str, float]]:
    """The logged rows: protocol buffers in the log format of LevelDB, behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, whole, rows = file.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:  # too small for a header: filled with zeros
            position += BLOCK - position % BLOCK
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (FIRST, MIDDLE):
            continue
        record = wandb_internal_pb2.Record()
        record.ParseFromString(whole)
        whole = b""
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return rows
