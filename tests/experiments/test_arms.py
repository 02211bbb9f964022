"""The runner of arms end to end, on an MLP and a few images: artifacts, training, evaluation, table, repetition."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from datamerge.encoders import Head, load_encoder, save_encoder
from experiments.arms import Prepared, main

SPEC = "mlp:3x8x8-16-6"
SETTINGS = """
prepare = "tests.experiments.test_arms:prepare"

[merge]
members = 3
epsilon = "2/255"
step_size = "1/255"
steps = 2
limit_first = 12
keep_clean = true
groups_per_shard = 6
batch_size = 6

[published]
rounds-2 = { rounds = 2, arm = "random-member" }

[remerge]
sketch = { factors = 1, keep_members = false }
rounds-2-sketch = { source = "rounds-2", factors = 1, keep_members = false }

[train]
steps = 4
batch_size = 4
learning_rate = 1e-3
warmup_steps = 2

[evaluate]
epsilon = "2/255"
steps = 2

[arms]
AT-2-Ind = { artifact = "members", arm = "ind", members = 2 }
AT-3-Factors = { artifact = "sketch", arm = "factors", estimator = "gauss_newton" }
"AT-2-Factors, rounds" = { artifact = "rounds-2-sketch", arm = "factors" }
"FARE online" = { artifact = "members", arm = "clean", refine_steps = 2, learning_rate = 1e-4 }
"""


def prepare(data: Path, work: Path) -> Prepared:
    """Random images and random weights."""
    work.mkdir(parents=True, exist_ok=True)
    encoder = load_encoder(SPEC)
    save_encoder(encoder, work / "encoder.safetensors")
    (work / "head.safetensors").write_bytes(Head(torch.eye(3, 6), torch.zeros(3)).to_bytes())
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(work / "images.npz", images=images, labels=rng.integers(0, 3, 12))
    source = str(work / "images.npz")
    return Prepared(source, lambda _: source, f"{SPEC}@{work}/encoder.safetensors", f"{work}/head.safetensors")


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("ray_driver")
def test_arms_are_run_once_and_reused(tmp_path: Path) -> None:
    settings, work = tmp_path / "tiny.toml", tmp_path / "work"
    settings.write_text(SETTINGS)
    arguments = [str(settings), "--data", str(tmp_path), "--work", str(work), "--seeds", "0,1"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    facts = json.loads((tmp_path / "results-tiny.json").read_text())["rows"]
    assert list(facts) == ["w/o AT", "AT-2-Ind", "AT-3-Factors", "AT-2-Factors, rounds", "FARE online"]
    assert all(row["seeds"] == [0, 1] and row["images"] == 24 for row in facts.values())
    # Forward passes: two members at 3; mean and one point at 3; one point; two steps of an attack at 2, and a step.
    assert [row["forward_passes"] for row in facts.values()] == [None, 6, 6, 3, 7]
    assert facts["AT-2-Ind"]["stored_bytes"] > facts["FARE online"]["stored_bytes"] > 0
    assert "| AT-3-Factors |" in (tmp_path / "results-tiny.md").read_text()
    assert (tmp_path / "plot-tiny.png").stat().st_size > 1000
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*.safetensors")}
    assert CliRunner().invoke(main, arguments, catch_exceptions=False).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in before if path.parent.name != "work"} == {
        path: time for path, time in before.items() if path.parent.name != "work"
    }
    learning_rate = json.loads((work / "tiny" / "runs" / "FARE_online-0" / "run.json").read_text())["config"][
        "learning_rate"
    ]
    assert learning_rate == 1e-4
    # A folder has results of one set of settings only.
    settings.write_text(SETTINGS.replace("learning_rate = 1e-3", "learning_rate = 2e-3"))
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    for fact in (work, '"learning_rate": 0.001', '"learning_rate": 0.002', "--work"):
        assert str(fact) in result.output
