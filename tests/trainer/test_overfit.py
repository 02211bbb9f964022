"""Catastrophic overfitting to one-step attacks: reported, stopped, or ended by wider noise; and healthy runs."""

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
# 256 units memorise the ten images, and noise is so small that a step of 2ε always ends at the same points.
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


def _checks(run: Path) -> dict[int, tuple[float, float]]:
    """Losses under PGD and under the run's own attack by step."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: (line["pgd_loss"], line["own_attack_loss"]) for line in lines if "pgd_loss" in line}


def test_overfitting_is_reported_once(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = _run(artifact, tmp_path / "run")
    checks = _checks(tmp_path / "run")
    assert [*checks] == [10, 20, 30, 40, 50, 60]
    # Under PGD worse than guessing among six classes, under the run's own attack nearly perfect.
    assert checks[60][0] > 1.79 > 0.2 > checks[60][1]
    assert (summary.overfitted, summary.widened) == (FOUND, False)
    said = capsys.readouterr().err
    assert said.count("catastrophic overfitting") == 1
    assert f"WARNING: step {FOUND}: the loss under PGD rose from {checks[10][0]:.4g} " in said
    assert f"to {checks[FOUND][0]:.4g}, while under the run's own attack it is {checks[FOUND][1]:.4g} (" in said


def test_wider_noise_ends_the_overfitting(artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = _run(artifact, tmp_path / "run", on_overfit="widen")
    assert (summary.overfitted, summary.widened) == (FOUND, True)
    assert "noise of radius 128/255" in capsys.readouterr().err
    pgd, own = _checks(tmp_path / "run")[60]
    assert pgd < 2 * own
    assert pgd < _checks(tmp_path / "run")[FOUND][0] - 1


def test_a_stopped_run_repeats_its_error(artifact: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for _ in "ab":
        with pytest.raises(OverfittedRun, match=r"step 30: .*none is left from before it; try") as caught:
            _run(artifact, run, on_overfit="stop")
        assert caught.value.exit_code == 1
        assert f"saved {run / 'checkpoints/step-000030.pt'}" in str(caught.value)
    assert not (run / "run.json").exists()
    # Without `on_overfit="stop"` the run continues.
    assert _run(artifact, run).overfitted == FOUND


def test_the_error_names_the_last_checkpoint_before_the_overfitting(artifact: str, tmp_path: Path) -> None:
    with pytest.raises(OverfittedRun, match=r"last one from before it is .*step-000020\.pt; try"):
        _run(artifact, tmp_path / "run", on_overfit="stop", checkpoint_every=5, keep_checkpoints=9)


@pytest.mark.parametrize("stop", [15, 30, 35])
def test_a_continued_run_ends_with_the_same_weights(
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
    assert _checks(tmp_path / "run") == _checks(tmp_path / "whole")
    with refused(ConfigError, "run", "on_overfit", "widen"):
        _run(artifact, tmp_path / "run", steps=50)


@pytest.mark.parametrize("epsilon", ["2/255", "16/255"])
def test_checks_do_not_change_a_healthy_run(artifact: str, tmp_path: Path, epsilon: str) -> None:
    modes: dict[str, dict[str, Any]] = {"watched": {"on_overfit": "widen"}, "alone": {"overfit_every": 0}}
    summaries = [
        _run(artifact, tmp_path / name, epsilon=epsilon, start_noise=None, steps=50, **how)
        for name, how in modes.items()
    ]
    assert summaries[0].encoder_sha256 == summaries[1].encoder_sha256
    assert [summary.overfitted for summary in summaries] == [None, None]
    assert _checks(tmp_path / "watched")
    assert not _checks(tmp_path / "alone")


def test_all_processes_decide_alike(artifact: str, tmp_path: Path) -> None:
    names = {"widen": {"on_overfit": "widen"}, "stop": {"on_overfit": "stop"}}
    entries = [_settings(artifact, tmp_path / f"two-{name}", **how) for name, how in names.items()]
    outcomes = launch(2, entries, tmp_path)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    # Sums in another order change the course of the overfitting, but alike in both runs.
    ends = [re.findall(r"ERROR step (\d+): the loss under PGD rose", text) for _, text in outcomes]
    assert ends[0] == ends[1]
    summary = json.loads((tmp_path / "two-widen/run.json").read_text())
    assert summary["widened"]
    assert ends[0] == [str(summary["overfitted"])]
    _run(artifact, tmp_path / "one")
    alone, together = _checks(tmp_path / "one"), _checks(tmp_path / "two-widen")
    assert together[EVERY] == pytest.approx(alone[EVERY], rel=1e-2)


def test_the_best_state_is_from_before_the_overfitting(
    artifact: str, make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    shared = {"shape": SHAPE, "clean": True, "labels": True, "targets": False, "members": False, "encoder": ENCODER}
    other = make_artifact(name="other", seed=11, **shared)
    _run(artifact, tmp_path / "run", eval_artifact=other, eval_every=5)
    assert torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)["step"] < FOUND


def test_conditions_of_overfitting() -> None:
    findings = Findings()
    for step, (pgd, own, found) in enumerate(
        [
            (9.0, 2.0, False),  # before training, one step finds little
            (3.0, 2.5, False),
            (4.6, 2.4, False),  # worse, but the run's own attack finds half of it
            (4.4, 1.0, False),  # not 1.5 times the lowest
            (4.6, 2.2, True),
            (3.0, 2.5, False),
            (0.1, 0.04, False),
            (0.4, 0.01, False),  # less than 1/20 of the first
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
def test_checks_cost_at_most_a_twentieth(settings: dict[str, Any], expected: int) -> None:
    """A check costs 24 forward passes for each of 32 groups, an update with a one-step attack 5 for each group."""
    config = TrainConfig(artifact="a", run="r", arm="clean", steps=5, refine_steps=1, **settings)
    assert every(config) == expected
