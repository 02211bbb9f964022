"""Checks before any work is done: a missing GPU is refused, and another class head is another plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from datamerge.encoders import Head
from merge_service import MergeConfig
from merge_service.cli import merge as command
from merge_service.merge import prepare
from storage_schemas import ConfigError
from tests.support.refusals import refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_refused_before_an_artifact_is_begun(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8))
    arguments = [str(tmp_path / "x.npz"), str(tmp_path / "a"), "--encoder", "mlp:3x8x8-4", "--device", "cuda"]
    with refused(ConfigError, "device", "'cuda'"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert not (tmp_path / "a").exists()


def test_another_head_is_another_plan(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((4, 8, 8, 3), np.uint8), labels=np.arange(4) % 3)
    heads = [Head(torch.eye(3, 4)), Head(2 * torch.eye(3, 4)), Head(torch.eye(3, 4), names=["a", "b", "c"])]
    found = []
    for index, head in enumerate(heads):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(head.to_bytes())
        settings = {"source": str(tmp_path / "x.npz"), "artifact": str(tmp_path / "a"), "encoder": "mlp:3x8x8-8-4"}
        config = MergeConfig.model_validate({**settings, "objective": "cross_entropy", "head": str(path)})
        facts = prepare(config).plan.provenance["head"]
        found.append({name: value for name, value in facts.items() if name != "spec"})
    assert found[0] != found[1]
    assert found[0] != found[2]
