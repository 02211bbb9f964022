"""Runs under Ray Train: real workers, one of which dies."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from storage_schemas import ConfigError
from tests.support.bench import Bench
from tests.support.paths import ROOT
from trainer import TrainConfig, train
from trainer.cli import train as command

MakeArtifact = Callable[..., str]

# An encoder that ends its process without an error, once: in worker 1, at the ninth forward pass.
MORTAL = """
import os, pathlib
import torch
from torch import nn

MARKER = pathlib.Path({marker!r})

class Mortal(nn.Module):
    input_shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 6)
        self.calls = 0
        nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, pixels):
        self.calls += 1
        if self.calls > 8 and os.environ.get("RANK") == "1" and not MARKER.exists():
            MARKER.touch()
            os._exit(1)
        return torch.tanh(self.layer(pixels.flatten(1)))
"""


@pytest.fixture
def _cluster(bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "mortal_networks.py").write_text(MORTAL.format(marker=str(tmp_path / "died")))
    monkeypatch.syspath_prepend(str(tmp_path))
    import ray

    # For workers to find the encoder's module.
    variables = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "OMP_NUM_THREADS": "1"}
    ray.init(address=bench.address, logging_level=40, log_to_driver=False, runtime_env={"env_vars": variables})
    yield
    ray.shutdown()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("_cluster")
def test_a_refusal_in_a_worker_is_that_of_the_command(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Two workers cannot share batches of one group; only workers notice it, and the command shows their error."""
    run = [make_artifact(), str(tmp_path / "run"), "--steps", "2", "--device", "cpu", "--ray-workers", "2"]
    result = CliRunner().invoke(command, run)
    assert isinstance(result.exception, ConfigError)
    assert result.exception.field == "batch_size"
    assert "`batch_size=2`" in str(result.exception)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::ResourceWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("_cluster")
def test_a_run_continues_from_its_checkpoint_after_a_worker_died(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(encoder=None)
    spec = "python:mortal_networks:Mortal"
    flags = "--steps 9 --batch-size 4 --lr 0.01 --log-every 1 --threads 1 --checkpoint-every 2 --device cpu"
    run = [artifact, str(tmp_path / "ray"), "--encoder", spec, *flags.split(), "--ray-workers", "2"]
    result = CliRunner().invoke(command, run)
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "died").exists()
    train(
        TrainConfig(artifact=artifact, run=str(tmp_path / "whole"), encoder=spec, steps=9, batch_size=4)
        .model_copy(update={"learning_rate": 0.01, "log_every": 1, "device": "cpu"})
    )  # fmt: skip
    losses = {}
    for name in ("ray", "whole"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        losses[name] = [(line["step"], line["loss"]) for line in lines]
    assert [step for step, _ in losses["ray"]] == list(range(1, 10))
    for (_, mine), (_, theirs) in zip(losses["ray"], losses["whole"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    weights = load_file(tmp_path / "ray/encoder.safetensors")
    for key, tensor in load_file(tmp_path / "whole/encoder.safetensors").items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)
