"""Settings that are refused, and the command `datamerge train`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from pydantic import ValidationError

import datamerge.cli
import trainer.data.stream
import trainer.run.job
from datamerge.encoders import Head, load_encoder, save_encoder
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, NotAnArtifact
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.arms import ARMS
from trainer.cli import train as command
from trainer.config import read_preset
from trainer.data.batches import Batch
from trainer.run.checkpoint import RunFolder

MakeArtifact = Callable[..., str]
LABELS = {"targets": False, "labels": True}


@pytest.mark.parametrize(
    ("artifact", "settings", "field", "facts"),
    [
        ({"encoder": None}, {}, "encoder", ["artifact", "none", "`encoder`"]),
        ({"encoder": "python:os:abort", "sha256": "0" * 64}, {}, "encoder", ["python:os:abort", "`encoder`"]),
        ({}, {"encoder": "mlp:1x5x5-8-6"}, "encoder", ["(1, 5, 5)", "(1, 4, 4)"]),
        ({}, {"encoder": "mlp:1x4x4-8-7"}, "encoder", ["width 7", "(6,)"]),
        ({}, {"encoder": "mpl:1x4x4-8-6"}, "encoder", ["'mpl:1x4x4-8-6'"]),
        ({"members": False}, {"arm": "ind"}, "arm", ["ind", "`keep_members=True`"]),
        ({}, {"arm": "factors"}, "arm", ["factors", "`factors=1`"]),
        ({}, {"arm": "ind", "members": 4}, "members", ["3 stored", "found 4"]),
        (LABELS, {"loss": "squared_error"}, "loss", ["squared_error", '`loss="cross_entropy"`']),
        ({}, {"loss": "cross_entropy"}, "loss", ["k0", '`loss="squared_error"`']),
        (LABELS, {"encoder": "mlp:1x4x4-8-5"}, "loss", ["label 5", "k5", "`head`", "`encoder`"]),
        (LABELS, {"loss_scale": 0.5}, "loss_scale", ["0.5", "cross_entropy"]),
        (LABELS, {"loss": "cosine", "arm": "ind"}, "loss", ["cosine", '`loss="cross_entropy"`']),
        (LABELS, {"clean_weight": 0.5}, "clean_weight", ["none", "`clean_weight`"]),
        ({}, {"clean_weight": 0.5}, "clean_weight", ["`keep_clean=True`", "`clean_weight`"]),
        (LABELS, {"head": "artifact"}, "head", ["none", "`head`"]),
        (LABELS, {"head": "nowhere.safetensors"}, "head", ["'nowhere.safetensors'"]),
        ({}, {"head": "artifact"}, "head", ["squared_error", "`head`"]),
        ({}, {"head": "artifact", "loss": "cosine", "arm": "ind"}, "head", ["cosine", "`head`"]),
        ({}, {"warmup_steps": 5}, "warmup_steps", ["5 steps", "`warmup_steps=0`"]),
        ({}, {"device": "warp"}, "device", ["'warp'"]),
        ({}, {"device": "meta:0:0"}, "device", ["'meta:0:0'"]),
    ],
)
def test_a_mismatch_is_refused_in_one_line_before_anything_is_written(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    artifact: dict[str, Any],
    settings: dict[str, Any],
    field: str,
    facts: list[str],
) -> None:
    config = TrainConfig(artifact=make_artifact(**artifact), run=str(tmp_path / "run"), steps=5, **settings)
    with refused(ConfigError, field, *facts) as error:
        train(config)
    assert field == "device" or "--" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_weights_named_only_by_the_artifact_must_be_those_of_its_merge(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    """Weights that the merge did not use may be confidential: they are refused unless `encoder` names them."""
    mine, other = tmp_path / "mine.safetensors", tmp_path / "other.pt"
    save_encoder(load_encoder("mlp:1x4x4-8-6"), mine)
    spec = f"mlp:1x4x4-8-6@{mine}"
    honest, forged = make_artifact(name="honest", encoder=spec), make_artifact(encoder=spec, sha256="0" * 64)
    torch.save(load_encoder(spec).model.state_dict(), other)
    pickled = make_artifact(name="pickled", encoder=f"mlp:1x4x4-8-6@{other}")
    for number, (artifact, facts) in enumerate([(forged, ["others", mine]), (pickled, [".safetensors", other])]):
        with refused(ConfigError, "encoder", artifact, "`encoder`", *facts):
            train(TrainConfig(artifact=artifact, run=str(tmp_path / f"refused-{number}"), steps=1))
    train(TrainConfig(artifact=honest, run=str(tmp_path / "run"), steps=1))
    train(TrainConfig(artifact=forged, run=str(tmp_path / "asked-for"), steps=1, encoder=spec))


def test_a_head_of_another_width_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(**LABELS, head=Head(torch.eye(9)).to_bytes())
    with refused(ConfigError, "head", "width 6", "[9, 9]"):
        train(TrainConfig(artifact=artifact, run=str(tmp_path / "run"), steps=5))


def test_folders_and_files_that_are_no_run_are_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter1.tex").write_text("!")
    with refused(ConfigError, "run", "'chapter1.tex'", folder, "identity.json"):
        train(TrainConfig(artifact=artifact, run=str(folder), steps=5))
    with refused(ConfigError, "run", "file", folder / "chapter1.tex"):
        train(TrainConfig(artifact=artifact, run=str(folder / "chapter1.tex"), steps=5))
    with refused(NotAnArtifact, None, folder):
        train(TrainConfig(artifact=str(folder), run=str(tmp_path / "run"), steps=5))


@pytest.mark.parametrize(
    ("settings", "field", "facts"),
    [
        ({"learning_rate": -1.0}, "learning_rate", ["-1.0"]),
        ({"learning_rate": float("nan")}, "learning_rate", ["nan"]),
        ({"loss_scale": 2.0}, "loss_scale", ["1.0", "0.5", "2.0"]),
        ({"loss": "cosine"}, "loss", ["cosine", "gauss_newton", '`estimator="sampled"`']),
        ({"loss": "cosine", "arm": "factors", "estimator": "gauss_newton"}, "loss", ["cosine", "gauss_newton"]),
        ({"loss": "cosine", "arm": "clean", "refine_steps": 1, "start_noise": "0"}, "start_noise", ["gradient 0"]),
        ({"clean_weight": -0.5}, "clean_weight", ["-0.5"]),
        ({"batch_size": 0}, "batch_size", ["0"]),
        ({"steps": None}, "steps", ["epochs", "none"]),
        ({"epochs": 3}, "steps", ["steps = 5", "epochs = 3"]),
        ({"members": 2}, "members", ["ind", "random-member", "avg"]),
        ({"samples": 3, "arm": "mean-only"}, "samples", ["avg", "factors", "mean-only"]),
        ({"estimator": "exact"}, "estimator", ["exact", 'estimator = "antithetic"']),
        ({"estimator": "antithetic", "arm": "mean-only"}, "estimator", ["avg", "factors", "mean-only"]),
        ({"estimator": "gauss_newton", "arm": "ind"}, "estimator", ["avg", "factors", "ind"]),
        ({"refine_steps": 1, "refine_step_size": "0", "arm": "ind"}, "refine_step_size", ["0", "`refine_step_size`"]),
        ({"ray_workers": 0}, "ray_workers", ["0"]),
        ({"deviation": 1.5}, "deviation", ["factors", "avg"]),
        ({"batchsize": 3}, "batchsize", ["batch_size"]),
        ({"arm": "average"}, "arm", ["average"]),
        ({"arm": ["avg"]}, "arm", ["avg"]),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], field: str, facts: list[str]) -> None:
    with refused(ConfigError, field, *facts):
        TrainConfig.model_validate({"artifact": "a", "run": "r", "steps": 5, **settings})


def test_settings_are_immutable() -> None:
    config = TrainConfig(artifact="a", run="r", steps=5)
    with pytest.raises(ValidationError):
        config.seed = 1  # type: ignore[misc]


def test_the_paper_preset_is_the_papers_table() -> None:
    assert resources.files("trainer").joinpath("presets/paper.toml").is_file()
    config = load_settings(TrainConfig, None, {"artifact": "a", "run": "r"}, read_preset("paper"))
    assert (config.learning_rate, config.weight_decay, config.batch_size) == (1e-5, 1e-4, 1)
    assert (config.steps, config.warmup_steps) == (5000, 350)
    assert (config.arm, config.loss, config.loss_scale) == ("avg", "squared_error", 1.0)
    with refused(ConfigError, "preset", "factors, fare2, fare4, pair, paper, refined, stored, tecoa", "'papre'"):
        read_preset("papre")


def test_the_factors_preset_differs_from_the_papers_in_its_arm_alone() -> None:
    papers, factors = read_preset("paper"), read_preset("factors")
    assert factors == papers | {"arm": "factors"}
    config = load_settings(TrainConfig, None, {"artifact": "a", "run": "r"}, factors)
    assert (config.arm, config.estimator) == ("factors", "sampled")


def test_flags_win_over_the_file_and_the_file_over_the_preset(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("seed = 4\nbatch_size = 2\nwarmup_steps = 0\n")
    arguments = [make_artifact(), str(tmp_path / "run"), "--preset", "paper", "--config", str(file)]
    result = CliRunner().invoke(command, [*arguments, "--epochs", "1", "--seed", "9", "--lr", "0.001", "--clip", "2"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    expected = {"seed": 9, "batch_size": 2, "steps": 5, "learning_rate": 0.001, "weight_decay": 1e-4}
    assert {name: config[name] for name in expected} == expected
    assert result.stdout.strip() == f"mlp:1x4x4-8-6@{tmp_path / 'run/encoder.safetensors'}"


def test_random_and_unexpected_weights_give_warnings(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    arguments = [make_artifact(sha256="0" * 64), str(tmp_path / "run"), "--steps", "1"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    warnings = [line for line in result.stderr.splitlines() if "WARNING" in line]
    assert any("mlp:1x4x4-8-6" in line and "random" in line for line in warnings)
    assert any("mlp:1x4x4-8-6" in line and "000000000000" in line for line in warnings)


def _datamerge(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the whole command, in this process."""
    monkeypatch.setattr(sys, "argv", ["datamerge", "train", *arguments])
    with pytest.raises(SystemExit) as end:
        datamerge.cli.main()
    return int(end.value.code or 0)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_have_their_exit_codes(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    original = trainer.data.stream.stream

    def stream(*args: Any, **options: Any) -> Iterator[Batch]:
        for batch in original(*args, **options):
            signal.raise_signal(number)
            yield batch

    monkeypatch.setattr(trainer.run.job, "stream", stream)
    assert _datamerge(monkeypatch, make_artifact(), str(tmp_path / "run"), "--steps", "5") == code
    last = capsys.readouterr().err.splitlines()[-1]
    checkpoint = tmp_path / "run/checkpoints/step-000001.pt"
    assert "step 1 of 5" in last
    assert str(checkpoint) in last
    assert checkpoint.exists()


def test_a_refused_setting_ends_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _datamerge(monkeypatch, "artifact", str(tmp_path / "run"), "--steps", "3", "--lr", "-1") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --learning-rate: ")
    assert "-1.0" in line


def test_ctrl_c_with_data_workers_saves_a_checkpoint(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "datamerge",
            "train",
            make_artifact(),
            str(run),
            "--steps",
            "1000000",
            "--data-workers",
            "1",
        ],
        stderr=subprocess.PIPE,
        text=True,
        # A group of its own, so that the signal reaches the readers too, as it does from a terminal.
        start_new_session=True,
    )
    deadline = time.monotonic() + 180  # two interpreters start and import torch, perhaps on a busy machine
    while not (run / "log.jsonl").exists() or not (run / "log.jsonl").stat().st_size:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    (checkpoint,) = (run / "checkpoints").iterdir()
    assert str(checkpoint) in errors


def test_a_remote_run_folder_is_refused() -> None:
    """Otherwise a folder named `s3:` would be made, and be lost with its container."""
    with refused(ConfigError, "run", "s3://bucket/runs/a"):
        RunFolder("s3://bucket/runs/a")


def test_help_describes_the_arms_and_the_unit_of_batches() -> None:
    text = " ".join(CliRunner().invoke(command, ["--help"], terminal_width=200).output.split())
    for name, arm in ARMS.items():
        about = arm.about.replace("`refine_steps`", "--refine-steps")
        assert f"{name}: {about}" in text
    assert "Groups (not images) per optimiser step" in text
