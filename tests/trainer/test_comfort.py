"""Conveniences of runs: presets, bfloat16, averaged weights, held-out losses, and messages that name the cause."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer.run.update
from datamerge.encoders import load_encoder
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, DatamergeError, open_artifact
from storage_schemas.schema.pixel_length import PixelLength
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.arms import ARMS
from trainer.cli import train as command
from trainer.config import read_preset
from trainer.data.order import MEMBER, Order, stream_seeds
from trainer.errors import NotFiniteRun
from trainer.run.checkpoint import RunFolder
from trainer.run.forward import check_rows_apart

MakeArtifact = Callable[..., str]


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    defaults = {"steps": 9, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(artifact=artifact, run=str(run), **{**defaults, **settings})


def _log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "encoder.safetensors")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fare2", {"arm": "clean", "loss": "squared_error", "epsilon": PixelLength("2/255"), "refine_steps": 2}),
        ("fare4", {"arm": "clean", "loss": "squared_error", "epsilon": PixelLength("4/255"), "refine_steps": 2}),
        ("tecoa", {"arm": "clean", "loss": "cross_entropy", "epsilon": None, "refine_steps": 2}),
        ("refined", {"arm": "random-member", "loss": "squared_error", "refine_steps": 1}),
        ("stored", {"arm": "random-member", "loss": "squared_error", "refine_steps": 0}),
    ],
)
def test_presets_are_the_published_settings(name: str, expected: dict[str, Any]) -> None:
    config = load_settings(TrainConfig, None, {"artifact": "a", "run": "r"}, read_preset(name))
    assert {key: getattr(config, key) for key in expected} == expected
    assert (config.batch_size, config.learning_rate, config.weight_decay) == (128, 1e-5, 1e-4)
    steps, warmup = config.steps or 0, config.warmup_steps
    passes = steps * ARMS[config.arm].forward_passes(refine_steps=config.refine_steps)
    fare = 20_000 * ARMS["clean"].forward_passes(refine_steps=10)
    assert passes <= fare / 4
    assert warmup / steps == 1400 / 20_000


def test_the_pair_preset_is_the_papers_except_for_its_arm() -> None:
    presets = {
        name: load_settings(TrainConfig, None, {"artifact": "a", "run": "r"}, read_preset(name))
        for name in ("paper", "pair")
    }
    changed = {key for key, value in presets["pair"] if value != getattr(presets["paper"], key)}
    assert (presets["pair"].arm, presets["pair"].deviation) == ("factors", 1.25)
    assert changed <= {"arm", "deviation", "estimator"}


def test_another_epsilon_than_that_of_the_artifact_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(attack={"epsilon": "4/255"})
    with refused(ConfigError, "epsilon", "2/255", "4/255", artifact):
        train(_config(artifact, tmp_path / "run", epsilon="2/255"))
    train(_config(artifact, tmp_path / "run", epsilon="4/255"))


@pytest.mark.parametrize(("size", "expected"), [("200GB", 200 * 10**9), ("1.5TiB", 3 * 2**39), (7, 7)])
def test_sizes_may_have_units(size: str | int, expected: int) -> None:
    flags = {"artifact": "a", "run": "r", "steps": 1, "cache": "c", "cache_bytes": size}
    assert load_settings(TrainConfig, None, flags).cache_bytes == expected


def test_a_malformed_size_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    arguments = [make_artifact(), str(tmp_path / "run"), "--steps", "1", "--cache-bytes", "100GG"]
    error = CliRunner().invoke(command, arguments).exception
    assert isinstance(error, ConfigError)
    assert error.field == "cache_bytes"
    assert "'100GG'" in str(error)


def test_flags_become_settings_of_the_run(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    flags = "--steps 2 --batch-size 4 --learning-rate 0.001 --samples 3 --device cpu --freeze 1.weight,1.bias"
    result = CliRunner().invoke(command, [make_artifact(), str(tmp_path / "run"), *flags.split(), "--ema", "0.9"])
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    expected = {"learning_rate": 0.001, "samples": 3, "freeze": ["1.weight", "1.bias"], "ema": 0.9}
    assert {name: config[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "field", "facts"),
    [
        ({"smaples": 3}, "smaples", ["samples"]),
        ({"precision": "bf16"}, "precision", ["bf16", 'precision = "bfloat16"']),
        ({"estimator": "jvp"}, "estimator", ["jvp", 'estimator = "gauss_newton"']),
    ],
)
def test_misspelt_and_earlier_names_get_a_hint(settings: dict[str, Any], field: str, facts: list[str]) -> None:
    with refused(ConfigError, field, *facts):
        load_settings(TrainConfig, None, {"artifact": "a", "run": "r", "steps": 1, **settings})


def test_frozen_layers_keep_their_values(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    train(_config(make_artifact(), tmp_path / "run", freeze=["1.*"]))
    before = load_encoder("mlp:1x4x4-8-6").model.state_dict()
    after = _weights(tmp_path / "run")
    assert {name for name in after if torch.equal(after[name], before[name])} == {"1.weight", "1.bias"}


def test_a_freeze_pattern_that_matches_nothing_or_all_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    with refused(ConfigError, "freeze", "'1.wieght'", "'1.weight'"):
        train(_config(artifact, tmp_path / "run", freeze=["1.wieght"]))
    with refused(ConfigError, "freeze", "*", "all"):
        train(_config(artifact, tmp_path / "run", freeze=["*"]))


def test_the_average_of_the_weights_is_published(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    decay, steps = 0.8, 4
    averages = dict(load_encoder("mlp:1x4x4-8-6").model.state_dict())
    train(_config(artifact, tmp_path / "run", ema=decay, steps=steps, checkpoint_every=1, keep_checkpoints=9))
    train(_config(artifact, tmp_path / "plain", steps=steps))
    for step in range(1, steps + 1):
        if step < steps:
            state = torch.load(tmp_path / f"run/checkpoints/step-{step:06d}.pt", weights_only=True)["model"]
            weights = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        else:  # the last weights are not in a checkpoint, but the same run without an average ends with them
            weights = _weights(tmp_path / "plain")
        # The first update starts the average.
        averages = {
            name: weights[name].clone() if step == 1 else decay * averages[name] + (1 - decay) * weights[name]
            for name in averages
        }
    for name, tensor in _weights(tmp_path / "run").items():
        torch.testing.assert_close(tensor, averages[name])
    assert not torch.equal(_weights(tmp_path / "run")["1.weight"], _weights(tmp_path / "plain")["1.weight"])


@pytest.mark.parametrize("estimator", ["gauss_newton", "sampled", "antithetic"])
def test_bfloat16_trains_close_to_float32(make_artifact: MakeArtifact, tmp_path: Path, estimator: str) -> None:
    artifact = make_artifact()
    for precision in ("float32", "bfloat16"):
        train(_config(artifact, tmp_path / precision, precision=precision, estimator=estimator, learning_rate=1e-3))
    full, half = (_log(tmp_path / precision) for precision in ("float32", "bfloat16"))
    assert [line["loss"] for line in half] == pytest.approx([line["loss"] for line in full], rel=0.05)
    assert [line["loss"] for line in half] != [line["loss"] for line in full]
    assert all(tensor.dtype == torch.float32 for tensor in _weights(tmp_path / "bfloat16").values())


@pytest.mark.parametrize("estimator", ["sampled", "gauss_newton"])
def test_a_compiled_run_ends_with_the_same_weights(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, estimator: str
) -> None:
    # Without code generation: neither names, results nor what is compiled depend on the backend.
    calls: list[int] = []
    original = torch.compile

    def compile_eagerly(function: Callable[..., Any], **_: Any) -> Any:
        calls.append(1)
        return original(function, backend="aot_eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    artifact = make_artifact()
    train(_config(artifact, tmp_path / "a", estimator=estimator, steps=3))
    assert not calls
    train(_config(artifact, tmp_path / "b", estimator=estimator, steps=3, compile=True))
    assert calls
    for name, tensor in _weights(tmp_path / "a").items():
        torch.testing.assert_close(tensor, _weights(tmp_path / "b")[name])


def test_random_member_trains_on_the_drawn_member(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """The losses equal those of an independent loop, one group at a time; epochs draw different members."""
    path = make_artifact()
    train(_config(path, tmp_path / "run", arm="random-member", learning_rate=1e-12, seed=5))
    artifact, encoder = open_artifact(path), load_encoder("mlp:1x4x4-8-6")
    order, losses = Order(artifact.shard_sizes, 4, 5), []
    chosen: dict[int, list[int]] = {}
    for step in range(9):
        values = []
        words = stream_seeds(5, MEMBER, step, 4)
        for position, index in enumerate(order.batch(step).tolist()):
            record = artifact[index]
            assert record.members is not None
            assert record.target is not None
            member = words[position] % 3
            chosen.setdefault(index, []).append(member)
            pixels = torch.from_numpy(record.members[member : member + 1]).float() / 255
            values.append(float(((encoder(pixels).detach() - torch.from_numpy(record.target)) ** 2).sum()))
        losses.append(np.mean(values))
    assert [line["loss"] for line in _log(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)
    assert any(len(set(members)) > 1 for members in chosen.values())
    assert json.loads((tmp_path / "run/run.json").read_text())["arm"] == "AT-3-Random"


@pytest.mark.parametrize("arm", ["avg", "ind", "mean-only"])
def test_the_held_out_loss_is_logged_and_its_best_state_kept(
    make_artifact: MakeArtifact, tmp_path: Path, arm: str
) -> None:
    artifact, other = make_artifact(), make_artifact(name="other", format="zarr")
    settings = {"eval_artifact": other, "eval_every": 2, "arm": arm, "learning_rate": 0.3, "steps": 9}
    train(_config(artifact, tmp_path / "run", log_every=100, **settings))
    lines = _log(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 9]
    best = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    assert best["best"] == min(line["eval_loss"] for line in lines)
    # Recomputed from the records one by one; exact for the arms without randomness.
    encoder = load_encoder("mlp:1x4x4-8-6")
    encoder.load_state_dict(best["model"])
    values = []
    for record in open_artifact(other):
        assert record.members is not None
        pixels = (
            torch.from_numpy(record.members).float() / 255 if arm == "ind" else torch.from_numpy(record.mean)[None]
        )
        values.append(float(((encoder(pixels) - torch.from_numpy(record.target)) ** 2).sum(1).mean().detach()))
    if arm == "avg":
        assert best["best"] > np.mean(values)
    else:
        assert best["best"] == pytest.approx(np.mean(values), rel=1e-5)


def test_a_held_out_artifact_with_wider_targets_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    other = make_artifact(name="other", width=7)
    with refused(ConfigError, "encoder", "width 6", "(7,)", other):
        train(_config(make_artifact(), tmp_path / "run", eval_artifact=other))


def test_a_batch_whose_loss_is_not_finite_is_saved(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    with refused(NotFiniteRun, None, "k6") as error:
        train(_config(make_artifact(huge="k6"), tmp_path / "run", accumulate=2))
    (path,) = re.findall(r"/[^\s;]+/not-finite-[^\s;]+\.pt", str(error.value))
    batches = torch.load(path, weights_only=True)["batches"]
    assert "k6" in [key for batch in batches for key in batch["keys"]]
    assert sum(len(batch["keys"]) for batch in batches) in (2, 4)
    assert batches[0]["mean"].shape[1:] == (1, 4, 4)


def test_out_of_memory_names_the_settings_to_lower(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*arguments: Any) -> None:
        # PyTorch's allocator raises a RuntimeError on the CPU, and a subclass of it on a GPU.
        torch.empty(1 << 60, dtype=torch.uint8)

    monkeypatch.setattr(trainer.run.update, "group_losses", exhausted)
    with refused(DatamergeError, "batch_size", "4 groups", "`accumulate=2`", "sampled", "bfloat16"):
        train(_config(make_artifact(), tmp_path / "run"))


class _Centred(nn.Module):
    input_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        embeddings: Tensor = self.layer(pixels.flatten(1))
        return embeddings - embeddings.mean(0)


def test_an_encoder_that_mixes_its_batch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    module = types.ModuleType("mixing_networks")
    module.__dict__["centred"] = _Centred
    monkeypatch.setitem(sys.modules, "mixing_networks", module)
    with refused(ConfigError, "encoder", "python:mixing_networks:centred", "LayerNorm"):
        check_rows_apart(load_encoder("python:mixing_networks:centred"), torch.device("cpu"))


def test_a_changed_artifact_is_refused_and_another_torch_reported(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact()
    config = _config(artifact, tmp_path / "run", checkpoint_every=3)

    def die(*arguments: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "publish", die)
        with pytest.raises(MemoryError):
            train(config)
    with refused(
        ConfigError, "run", tmp_path / "run", "another artifact", "plan_sha256", "use the same artifact to continue"
    ):
        train(config.model_copy(update={"artifact": make_artifact(name="other", members=False)}))
    newest = tmp_path / "run/checkpoints/step-000006.pt"
    state = torch.load(newest, weights_only=True)
    torch.save({**state, "torch": "1.0.0"}, newest)
    train(config)
    said = capsys.readouterr().err
    assert "torch 1.0.0" in said
    assert torch.__version__ in said


def test_a_run_killed_several_times_ends_with_the_same_bits(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """SIGKILL at any step, twice; then SIGTERM; then to the end."""
    artifact, run = make_artifact(), tmp_path / "run"
    steps = 800
    flags: dict[str, Any] = {"batch_size": 4, "threads": 1, "checkpoint_every": 25, "log_every": 10, "ema": 0.9}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    process = [sys.executable, "-m", "datamerge", "train", artifact, str(run), f"--steps={steps}", *arguments]

    def newest_checkpoint() -> int:
        checkpoints = RunFolder(str(run)).checkpoints() if (run / "identity.json").exists() else []
        return int(checkpoints[-1].stem.removeprefix("step-")) if checkpoints else 0

    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM):
        before, deadline = newest_checkpoint(), time.monotonic() + 240
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(process, stderr=subprocess.PIPE, text=True, env=environment) as child:
            while newest_checkpoint() <= before and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            child.send_signal(number)
            _, errors = child.communicate(timeout=60)
        assert child.returncode == (0 if number == signal.SIGTERM else -number), errors
    assert f"step {newest_checkpoint()} of {steps}" in errors
    assert str(run / f"checkpoints/step-{newest_checkpoint():06d}.pt") in errors
    assert before < newest_checkpoint() < steps
    summary = train(TrainConfig(artifact=artifact, run=str(run), steps=steps, **flags))
    train(TrainConfig(artifact=artifact, run=str(tmp_path / "whole"), steps=steps, **flags))
    for name, tensor in _weights(tmp_path / "whole").items():
        assert torch.equal(tensor, _weights(run)[name])
    keys = ("step", "epoch", "loss", "gradient_norm")
    assert [[line[key] for key in keys] for line in _log(run)] == [
        [line[key] for key in keys] for line in _log(tmp_path / "whole")
    ]
    assert summary.steps == steps
