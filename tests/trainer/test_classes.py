"""Labels of artifacts and rows of heads are matched by class name, whatever the order of either."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from datamerge.encoders import Head
from storage_schemas import ConfigError
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.data.order import Partition
from trainer.run.job import make_job

MakeArtifact = Callable[..., str]
NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
WEIGHT = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def _head(names: Sequence[str]) -> bytes:
    """The same classifier with its rows in this order."""
    order = [NAMES.index(name.lower()) for name in names]
    return Head(WEIGHT[order], names=names).to_bytes()


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        artifact=artifact,
        run=str(run),
        **{"steps": 3, "batch_size": 4, "device": "cpu", "arm": "mean-only", **settings},
    )


def _losses(run: Path, name: str = "loss") -> list[float]:
    return [line[name] for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if name in line]


@pytest.mark.parametrize("names", [NAMES[::-1], ["Fox", "ANT", "eel", "bee", "dog", "cat"]])
def test_a_head_with_its_rows_in_another_order_gives_the_same_losses(
    make_artifact: MakeArtifact, tmp_path: Path, names: list[str]
) -> None:
    artifact = make_artifact(targets=False, labels=True, head=_head(NAMES))
    train(_config(artifact, tmp_path / "own"))
    (tmp_path / "head.safetensors").write_bytes(_head(names))
    train(_config(artifact, tmp_path / "given", head=str(tmp_path / "head.safetensors")))
    assert _losses(tmp_path / "given") == pytest.approx(_losses(tmp_path / "own"), rel=1e-5)


def test_labels_of_a_held_out_artifact_are_matched_by_name(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(targets=False, labels=True, head=_head(NAMES))
    other = make_artifact(name="other", targets=False, labels=True, head=_head(NAMES[::-1]))
    job = make_job(_config(artifact, tmp_path / "run", eval_artifact=other))
    assert job.held_out is not None
    batches = job.held_out.feed(Partition(), 0, job.held_out.order.steps_per_epoch)
    found = {key: int(target) for batch in batches for key, target in zip(batch.keys, batch.target, strict=True)}
    assert found == {f"k{number}": 5 - number % 6 for number in range(10)}


def test_different_classes_are_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact(targets=False, labels=True, head=_head(NAMES))
    head = Head(WEIGHT, names=[*NAMES[:5], "gnu"]).to_bytes()
    (tmp_path / "head.safetensors").write_bytes(head)
    with refused(ConfigError, "head", artifact, "1", "'fox'", "'gnu'"):
        train(_config(artifact, tmp_path / "run", head=str(tmp_path / "head.safetensors")))
    other = make_artifact(name="other", targets=False, labels=True, head=head)
    with refused(ConfigError, "eval_artifact", other, "1", "'gnu'", "'fox'"):
        train(_config(artifact, tmp_path / "run", eval_artifact=other))


def test_matching_by_position_is_reported(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact(targets=False, labels=True, head=_head(NAMES))
    (tmp_path / "head.safetensors").write_bytes(Head(WEIGHT).to_bytes())
    train(_config(artifact, tmp_path / "run", head=str(tmp_path / "head.safetensors")))
    assert "positions in head" in capsys.readouterr().err
