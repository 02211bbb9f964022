"""A run whose attack of one step loses its meaning: found, ended, or mended; and runs that are well."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from storage_schemas import ConfigError
from storage_schemas.schema.run import RunSummary
from tests.support.ranks import launch
from tests.support.refusals import refused
from trainer import OverfittedRun, Stopped, TrainConfig, train
from trainer.run import update
from trainer.run.overfit import Findings, every

MakeArtifact = Callable[..., str]
ENCODER, SHAPE = "mlp:1x8x8-256-256-6", (1, 8, 8)
EVERY, FOUND, STEPS = 10, 30, 60
# Ten images, which 256 units learn by heart, and so little noise that a step of 2ε ends where it always does.
COLLAPSES: dict[str, Any] = {"epsilon": "64/255", "start_noise": "2/255", "learning_rate": 1e-2}


@pytest.fixture
def artifact(make_artifact: MakeArtifact) -> str:
    return make_artifact(shape=SHAPE, clean=True, labels=True, targets=False, members=False, encoder=ENCODER)


def _settings(artifact: str, run: Path, **settings: Any) -> dict[str, Any]:
    shared = {"arm": "clean", "loss": "cross_entropy", "refine_steps": 1, "batch_size": 32, "steps": STEPS}
    place = {"artifact": artifact, "run": str(run), "overfit_every": EVERY, "device": "cpu", "threads": 1}
    return {**shared, **place, **COLLAPSES, **settings}


def _run(artifact: str, run: Path, **settings: Any) -> RunSummary:
    return train(TrainConfig(**_settings(artifact, run, **settings)))


def _looks(run: Path) -> dict[int, tuple[float, float]]:
    """Losses under PGD and under the run's own attack by step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["pgd_loss"], line["own_attack_loss"]) for line in lines if "pgd_loss" in line}


def test_a_collapse_is_warned_of_once(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = _run(artifact, tmp_path / "run")
    looks = _looks(tmp_path / "run")
    assert [*looks] == [10, 20, 30, 40, 50, 60]
    # Worse than a guess among six classes under PGD, as good as perfect under the attack that is trained on.
    assert looks[60][0] > 1.79 > 0.2 > looks[60][1]
    assert (summary.overfitted, summary.widened) == (FOUND, False)
    said = capsys.readouterr().err
    assert said.count("catastrophic overfitting") == 1
    assert f"WARNING: step {FOUND}: the loss under PGD rose from {looks[10][0]:.4g} " in said
    assert f"to {looks[FOUND][0]:.4g}, while under the run's own attack it is {looks[FOUND][1]:.4g} (" in said


def test_wider_noise_mends_it(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = _run(artifact, tmp_path / "run", on_overfit="widen")
    assert (summary.overfitted, summary.widened) == (FOUND, True)
    assert "noise of radius 128/255" in capsys.readouterr().err
    pgd, own = _looks(tmp_path / "run")[60]
    assert pgd < 2 * own
    assert pgd < _looks(tmp_path / "run")[FOUND][0] - 1


def test_a_run_that_ends_says_so_again(artifact: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in "ab":
        with pytest.raises(OverfittedRun, match=r"step 30: .*none is left from before it; try") as caught:
            _run(artifact, run, on_overfit="stop")
        assert caught.value.exit_code == 1
        assert f"saved {run / 'checkpoints/step-000030.pt'}" in str(caught.value)
    assert not (run / "run.json").exists()
    # It can be gone on with, if somebody says so.
    assert _run(artifact, run).overfitted == FOUND


def test_the_last_state_before_it_is_named(artifact: str, tmp_path: Path) -> None:
    with pytest.raises(OverfittedRun, match=r"last one from before it is .*step-000020\.pt; try"):
        _run(artifact, tmp_path / "run", on_overfit="stop", checkpoint_every=5, keep_checkpoints=9)


@pytest.mark.parametrize("stop", [15, 30, 35])
def test_a_run_that_is_continued_ends_alike(
    artifact: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = _run(artifact, tmp_path / "whole", on_overfit="widen", steps=50)
    step, calls = update.Optimisation.step, []

    def interrupted(self: update.Optimisation, *arguments: Any) -> update.Outcome:
        calls.append(0)
        return step(self, *arguments)._replace(stop=signal.SIGTERM if len(calls) == stop else 0)

    monkeypatch.setattr(update.Optimisation, "step", interrupted)
    with pytest.raises(Stopped):
        _run(artifact, tmp_path / "run", on_overfit="widen", steps=50)
    again = _run(artifact, tmp_path / "run", on_overfit="widen", steps=50)
    assert again.encoder_sha256 == whole.encoder_sha256
    assert (again.overfitted, again.widened) == (FOUND, True)
    assert _looks(tmp_path / "run") == _looks(tmp_path / "whole")
    with refused(ConfigError, "run", "on_overfit", "widen"):
        _run(artifact, tmp_path / "run", steps=50)


@pytest.mark.parametrize("epsilon", ["2/255", "16/255"])
def test_a_run_that_is_well_is_left_alone(artifact: str, tmp_path: Path, epsilon: str) -> None:
    ways: dict[str, dict[str, Any]] = {"watched": {"on_overfit": "widen"}, "alone": {"overfit_every": 0}}
    summaries = [
        _run(artifact, tmp_path / name, epsilon=epsilon, start_noise=None, steps=50, **how)
        for name, how in ways.items()
    ]
    assert summaries[0].encoder_sha256 == summaries[1].encoder_sha256
    assert [summary.overfitted for summary in summaries] == [None, None]
    assert _looks(tmp_path / "watched")
    assert not _looks(tmp_path / "alone")


def test_processes_decide_alike(artifact: str, tmp_path: Path) -> None:
    names = {"widen": {"on_overfit": "widen"}, "stop": {"on_overfit": "stop"}}
    entries = [_settings(artifact, tmp_path / f"two-{name}", **how) for name, how in names.items()]
    outcomes = launch(2, entries, tmp_path)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    # A sum in another order is another course of a collapse; it is the same in both.
    ends = [re.findall(r"ERROR step (\d+): the loss under PGD rose", text) for _, text in outcomes]
    assert ends[0] == ends[1]
    summary = json.loads((tmp_path / "two-widen/run.json").read_text())
    assert summary["widened"]
    assert ends[0] == [str(summary["overfitted"])]
    _run(artifact, tmp_path / "one")
    alone, together = _looks(tmp_path / "one"), _looks(tmp_path / "two-widen")
    assert together[EVERY] == pytest.approx(alone[EVERY], rel=1e-2)


def test_a_best_state_is_none_that_only_fools_its_attack(
    artifact: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    shared = {"shape": SHAPE, "clean": True, "labels": True, "targets": False, "members": False, "encoder": ENCODER}
    other = make_artifact(name="other", seed=11, **shared)
    _run(artifact, tmp_path / "run", eval_artifact=other, eval_every=5)
    assert torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)["step"] < FOUND


def test_the_rule() -> None:
    findings = Findings()
    for step, (pgd, own, found) in enumerate(
        [
            (9.0, 2.0, False),  # before training, one step finds little
            (3.0, 2.5, False),
            (4.6, 2.4, False),  # worse, but the own attack sees half of it
            (4.4, 1.0, False),  # not so much worse
            (4.6, 2.2, True),
            (3.0, 2.5, False),
            (0.1, 0.04, False),
            (0.4, 0.01, False),  # small beside what it was
            (0.5, 0.01, True),
        ]
    ):
        findings.add(step, pgd, own)
        assert findings.overfitted is found, step
    assert (findings.found, findings.healthy, findings.lowest) == (4, 7, 0.1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"batch_size": 128}, 100), ({"batch_size": 16}, 192), ({"batch_size": 1}, 3072), ({"overfit_every": 7}, 7)],
    ids=str,
)
def test_looks_cost_a_twentieth(settings: dict[str, Any], expected: int) -> None:
    """A look at 32 groups is 24 forward passes each, an update of one step of attack 5."""
    config = TrainConfig(artifact="a", run="r", arm="clean", steps=5, refine_steps=1, **settings)
    assert every(config) == expected
