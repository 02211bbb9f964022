"""Merge → train → merge: the second round attacks the tuned encoder, and its provenance names the first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamerge.encoders import load_encoder
from datamerge.encoders.runs import encoder_spec, resolve
from datamerge.evaluation.results import Training
from datamerge.evaluation.runs import read_run
from storage_schemas import ConfigError, Location, open_artifact
from storage_schemas.operations.diff import diff
from storage_schemas.operations.remerge import Remerge, remerge
from tests.support.merging import merge_alone
from tests.support.refusals import refused
from trainer import TrainConfig, train

ORIGINAL = "mlp:1x6x5-8-4"


@pytest.fixture(scope="module")
def rounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos.npz, the first round's artifact, a run trained on it by the real command, and the second round."""
    folder = tmp_path_factory.mktemp("rounds")
    np.savez(folder / "photos.npz", images=np.random.default_rng(0).integers(0, 256, (8, 6, 5), np.uint8))
    merge_alone(folder / "photos.npz", folder / "adv-1", encoder=ORIGINAL)
    command = [
        "train",
        str(folder / "adv-1"),
        str(folder / "run"),
        "--steps",
        "6",
        "--batch-size",
        "4",
        "--warmup",
        "1",
    ]
    command += ["--lr", "0.01", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", "datamerge", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    merge_alone(folder / "photos.npz", folder / "adv-2", encoder=str(folder / "run"), target_encoder=ORIGINAL, seed=1)
    return folder


def test_the_second_round_attacks_the_tuned_encoder_towards_the_original_targets(rounds: Path) -> None:
    first, second = open_artifact(rounds / "adv-1"), open_artifact(rounds / "adv-2")
    tuned, original = load_encoder(encoder_spec(str(rounds / "run"))[0]), load_encoder(ORIGINAL)
    images = torch.from_numpy(np.load(rounds / "photos.npz")["images"][:, None]).float() / 255
    with torch.no_grad():
        tuned_embeddings, embeddings = tuned(images), original(images)
    assert not torch.allclose(tuned_embeddings, embeddings, atol=1e-3)
    for record in second:
        before, expected = first[record.key], embeddings[int(record.key.rpartition("-")[2])]
        assert record.target is not None
        assert before.target is not None
        # Not bit for bit: every seed has its own order, so that batches differ.
        np.testing.assert_allclose(record.target, before.target, atol=1e-6)
        np.testing.assert_allclose(record.target, expected.numpy(), atol=1e-6)
        assert not np.array_equal(record.mean, before.mean)


def test_provenance_links_the_rounds(rounds: Path) -> None:
    first, second = (open_artifact(rounds / name).manifest for name in ("adv-1", "adv-2"))
    attacked: Any = second.provenance["attacked_encoder"]
    target: Any = second.provenance["encoder"]
    assert attacked["run"]["plan_sha256"] == first.plan_sha256
    assert attacked["run"]["encoder_sha256"] == attacked["sha256"]
    assert attacked["run"]["original_sha256"] == target["sha256"]
    assert target["spec"] == ORIGINAL
    assert "run" not in target


def test_a_moved_run_is_found_and_one_that_was_tampered_with_is_refused(rounds: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("run.json", "encoder.safetensors"):
        (moved / name).write_bytes((rounds / "run" / name).read_bytes())
    facts = json.loads((moved / "run.json").read_bytes())
    facts["encoder"] = f"{ORIGINAL}@/gone/encoder.safetensors"
    (moved / "run.json").write_text(json.dumps(facts))
    assert resolve(str(moved)).encoder.sha256 == facts["encoder_sha256"]
    facts["encoder_sha256"] = "0" * 64
    (moved / "run.json").write_text(json.dumps(facts))
    with refused(ConfigError, "encoder", moved / "run.json", "0" * 12):
        resolve(str(moved))


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", pytest.param("[" * 100_000, id="deep")])
def test_folders_without_a_finished_run_are_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    with refused(ConfigError, "encoder", tmp_path, "run.json"):
        resolve(str(tmp_path))


def test_encoders_with_embeddings_of_different_sizes_are_refused(rounds: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "target_encoder", 4, 5):
        merge_alone(rounds / "photos.npz", tmp_path / "a", encoder=ORIGINAL, target_encoder="mlp:1x6x5-8-5")


@pytest.mark.parametrize("kind", ["sketch", "principal"])
def test_remerging_to_fewer_members_equals_a_merge_with_that_many(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "photos.npz", images=np.random.default_rng(0).integers(0, 256, (8, 6, 5), np.uint8))
    settings = {"encoder": ORIGINAL, "batch_size": 12, "groups_per_shard": 3}
    merge_alone(tmp_path / "photos.npz", tmp_path / "six", members=6, keep_members=True, **settings)
    smaller = Remerge(members=4, factors=2, factor_kind=kind)  # type: ignore[arg-type]
    remerge(open_artifact(tmp_path / "six"), Location(tmp_path / "four"), smaller)
    direct = merge_alone(
        tmp_path / "photos.npz",
        tmp_path / "direct",
        members=4,
        factors=2,
        factor_kind=kind,
        keep_members=True,
        **settings,
    )
    # Embeddings of another batch may differ in the last digit.
    found = diff(open_artifact(tmp_path / "four"), direct, 1e-6)
    assert found.settings == {}
    assert found.compared == 8
    assert not found.different
    assert set(found.furthest) <= {"target"}
    assert open_artifact(tmp_path / "four").manifest.layout == direct.manifest.layout


def test_a_run_on_several_artifacts_can_be_attacked_and_read(rounds: Path, tmp_path: Path) -> None:
    both, run = [str(rounds / "adv-1"), f"{rounds / 'adv-2'}=0.5"], str(tmp_path / "run")
    summary = train(TrainConfig(artifact=both, run=run, steps=2, batch_size=4, learning_rate=1e-2, device="cpu"))
    merge_alone(rounds / "photos.npz", tmp_path / "adv-3", encoder=run, target_encoder=ORIGINAL, seed=2)
    attacked: Any = open_artifact(tmp_path / "adv-3").manifest.provenance["attacked_encoder"]
    assert attacked["sha256"] == summary.encoder_sha256
    assert attacked["run"]["plan_sha256"] == summary.plan_sha256
    found = read_run(run).summary
    assert found == summary
    training = Training.of(found)
    assert training is not None
    assert training.artifact == summary.artifact
