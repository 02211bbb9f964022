"""Changed code makes a custom encoder a different one, even with equal weights, for results, runs and merges."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamerge.encoders import Head, load_encoder
from datamerge.evaluation import EvaluateConfig, evaluate
from merge_service import MergeConfig
from merge_service.merge import prepare
from merge_service.worker import Wanted
from storage_schemas import ConfigError, NotAnArtifact
from tests.support.merging import merge_alone
from tests.support.refusals import refused
from trainer import TrainConfig, train

SPEC = "python:own_changing:encoder"
CODE = """
import torch
from torch import nn

class Network(nn.Linear):
    def forward(self, pixels):
        return SIGN * super().forward(pixels.flatten(1))

def encoder():
    network = Network(12, 3)
    network.weight.data[:] = torch.linspace(-1, 1, 36).view(3, 12)
    network.input_shape = (3, 2, 2)
    return network

SIGN = 1
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (6, 2, 2, 3), np.uint8)
    np.savez(tmp_path / "photos.npz", images=images, labels=np.arange(6) % 3)
    (tmp_path / "head.safetensors").write_bytes(Head(torch.eye(3)).to_bytes())
    _write(tmp_path, CODE)
    return tmp_path


def _write(folder: Path, code: str) -> None:
    (folder / "own_changing.py").write_text(code)
    sys.modules.pop("own_changing", None)
    importlib.invalidate_caches()


def test_an_encoder_is_identified_by_weights_and_code(folder: Path) -> None:
    before = load_encoder(SPEC)
    _write(folder, CODE.replace("SIGN = 1", "SIGN = -1"))
    after = load_encoder(SPEC)
    assert before.sha256 == after.sha256
    assert before.code != after.code
    assert load_encoder("mlp:3x2x2-3").code is None
    with refused(ConfigError, "encoder", SPEC, "other code"):
        Wanted.of(before).load("cpu")


def test_results_of_other_code_are_not_reused(folder: Path) -> None:
    settings = {"runs": [SPEC], "data": str(folder / "photos.npz"), "head": str(folder / "head.safetensors")}
    config = EvaluateConfig.model_validate({**settings, "output": str(folder / "out"), "device": "cpu", "steps": 1})
    before = evaluate(config)
    assert evaluate(config)[0].scores == before[0].scores
    _write(folder, "# a comment\n" + CODE)
    evaluate(config)
    _write(folder, CODE.replace("SIGN = 1", "SIGN = -1"))
    with refused(ConfigError, "output", "encoder_code_sha256", folder / "out"):
        evaluate(config)


def test_runs_and_merges_are_not_continued_with_other_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos, artifact = folder / "photos.npz", folder / "artifact"
    merge_alone(photos, artifact, encoder=SPEC)
    settings: dict[str, Any] = {"encoder": SPEC, "batch_size": 2, "device": "cpu"}
    config = TrainConfig(artifact=str(artifact), run=str(folder / "run"), steps=2, **settings)
    train(config)
    _write(folder, CODE.replace("SIGN = 1", "SIGN = -1"))
    with refused(NotAnArtifact, None, artifact, "encoder.code_sha256"):
        merge_alone(photos, artifact, encoder=SPEC)
    with refused(ConfigError, "run", folder / "run", "encoder_code_sha256"):
        train(config)
    capsys.readouterr()
    train(config.model_copy(update={"run": str(folder / "another")}))
    assert "another version of the code" in capsys.readouterr().err
    plan = prepare(MergeConfig(source=str(photos), artifact=str(folder / "b"), encoder=SPEC, device="cpu")).plan
    assert plan.provenance["encoder"]["code_sha256"] == load_encoder(SPEC).code
