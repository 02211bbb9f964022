"""The table of arms: the settings offer its entries, and its costs equal the counted passes."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from storage_schemas import ConfigError
from tests.support.artifacts import same_groups
from tests.support.refusals import refused
from trainer import SquaredError, TrainConfig, train
from trainer.arms import ARMS, ArmName, EstimatorName
from trainer.data.noise import Draws
from trainer.data.order import WHOLE
from trainer.estimators import ALONG_FACTORS, AROUND_MEAN
from trainer.run.job import make_job
from trainer.run.objective import group_losses

MakeArtifact = Callable[..., str]
ATTACK = {"epsilon": "8/255", "step_size": "1/255", "steps": 10}


def test_the_settings_offer_the_arms_and_estimators_of_the_table() -> None:
    assert get_args(ArmName) == tuple(ARMS)
    assert {*get_args(EstimatorName)} == {name for arm in ARMS.values() for name in arm.estimators}
    assert ARMS["avg"].estimators.keys() == AROUND_MEAN.keys()
    assert ARMS["factors"].estimators.keys() == ALONG_FACTORS.keys()
    for name, arm in ARMS.items():
        config = TrainConfig(artifact="a", run="r", steps=1, arm=name)
        assert not arm.estimators or config.estimator == next(iter(arm.estimators))
        for estimate in arm.estimators.values():
            assert estimate.held_out in arm.estimators
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)
    assert (ARMS["avg"].name(5), ARMS["ind"].name(None)) == ("AT-5-Avg", "AT-Ind")
    assert (ARMS["clean"].name(5, 10), ARMS["ind"].name(5, 1)) == ("AT-Clean, 10 steps", "AT-5-Ind, 1 step")


class _Counted(nn.Module):
    """A linear model that counts the images that go through it, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 6)
        self.passes: Counter[str] = Counter()

    def forward(self, pixels: Tensor) -> Tensor:
        self.passes["forward"] += len(pixels)
        outputs: Tensor = torch.tanh(self.layer(pixels.flatten(1)))
        if outputs.requires_grad:
            outputs.register_hook(lambda gradient: self.passes.update(backward=len(gradient)))
        return outputs


CASES: list[tuple[dict[str, Any], int]] = [
    *(({"arm": arm, "refine_steps": steps}, 3) for arm in ("ind", "random-member", "mean-only") for steps in (0, 2)),
    *(({"arm": "clean", "refine_steps": steps}, 3) for steps in (1, 10)),
    ({"arm": "factors", "refine_steps": 2}, 3),
    *(({"arm": "factors", "estimator": name, "samples": s}, 3) for name in ALONG_FACTORS for s in (1, 3)),
    *(({"arm": "avg", "estimator": name, "samples": s}, 3) for name in ("sampled", "antithetic") for s in (1, 3)),
    *(({"arm": arm, "refine_steps": 2, "clean_weight": 0.5}, 3) for arm in ("ind", "clean", "factors")),
    ({"arm": "avg", "estimator": "sampled", "clean_weight": 0.5}, 3),
]


@pytest.mark.parametrize(("settings", "members"), CASES, ids=str)
def test_costs_equal_the_counted_passes(make_artifact: MakeArtifact, settings: dict[str, Any], members: int) -> None:
    """A plain step costs 3: one forward pass and a backward pass of twice that; a backward pass to pixels costs 1."""
    artifact = make_artifact(factors=2, clean=True, attack=ATTACK)
    config = TrainConfig(artifact=artifact, run="run", steps=1, batch_size=10, **settings)
    job = make_job(config)
    batch, model = next(iter(job.feed(WHOLE, 0, 1))).floats(), _Counted()
    losses = group_losses(model, batch, Draws(range(10)), SquaredError(), job.config, job.refinement)
    refining = model.passes["backward"]
    losses.loss.sum().backward()
    training = model.passes["backward"] - refining
    found = (model.passes["forward"] + refining + 2 * training) / 10
    arm = ARMS[config.arm]
    steps, samples = config.refine_steps, config.samples
    counted = arm.forward_passes(
        config.estimator,
        samples=samples,
        members=members,
        refine_steps=steps,
        clean_term=config.clean_weight > 0,
    )
    assert counted == found


def test_double_backward_costs_two_plain_steps() -> None:
    assert ARMS["avg"].forward_passes() == 6
    assert ARMS["avg"].forward_passes("gauss_newton", samples=4) == 15
    assert ARMS["avg"].forward_passes(clean_term=True) == 9


@pytest.mark.parametrize("clean_weight", [0.0, 0.5])
@pytest.mark.parametrize("arm", ARMS)
def test_batches_are_in_pixels_and_have_clean_images_if_the_arm_needs_them(
    make_artifact: MakeArtifact, arm: ArmName, clean_weight: float
) -> None:
    settings: dict[str, Any] = {"arm": arm, "clean_weight": clean_weight}
    if arm == "clean":
        settings |= {"refine_steps": 1, "epsilon": "8/255"}
    artifact = make_artifact(factors=2, clean=True)
    job = make_job(TrainConfig(artifact=artifact, run="run", steps=3, batch_size=4, **settings))
    for batch in job.feed(WHOLE, 0, 3):
        assert (batch.clean is not None) == (arm == "clean" or clean_weight > 0)
        batch = batch.floats()
        tensors = {name: value for name, value in batch.content().items() if isinstance(value, Tensor)}
        for name in tensors.keys() - {"target"}:
            assert tensors[name].dtype == torch.float32
            assert tensors[name].abs().max() <= 1
        moved = batch.to(torch.device("cpu"))
        assert type(moved) is type(batch)
        assert all(torch.equal(getattr(moved, name), value) for name, value in tensors.items())


def test_a_new_arm_needs_only_an_entry(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entry with ten times the loss of mean-only changes the name, the loss and the held-out loss of a run."""

    def tenfold(*arguments: Any) -> Any:
        found = plain.loss(*arguments)
        return found._replace(loss=10 * found.loss)

    plain = ARMS["mean-only"]
    artifact = make_artifact()
    shared: dict[str, Any] = {
        "artifact": artifact,
        "arm": "mean-only",
        "steps": 1,
        "batch_size": 10,
        "learning_rate": 1e-9,
    }
    shared |= {"eval_artifact": same_groups(artifact), "log_every": 1}
    lines = {}
    for name, arm in (("plain", plain), ("tenfold", replace(plain, title="Ten", loss=tenfold))):
        monkeypatch.setitem(ARMS, "mean-only", arm)
        summary = train(TrainConfig(run=str(tmp_path / name), **shared))
        assert summary.arm == ("AT-Mean" if name == "plain" else "AT-Ten")
        lines[name] = (tmp_path / name / "log.jsonl").read_text()
    one, ten = (json.loads(lines[name]) for name in ("plain", "tenfold"))
    assert (ten["loss"], ten["eval_loss"]) == pytest.approx((10 * one["loss"], 10 * one["eval_loss"]), rel=1e-4)


def test_settings_that_an_arm_does_not_support_are_refused() -> None:
    for name, arm in ARMS.items():
        required: dict[str, Any] = {"artifact": "a", "run": "r", "steps": 1, "arm": name}
        for supported, settings in (
            (arm.takes_members, {"members": 1}),
            (bool(arm.estimators), {"samples": 2}),
            (arm.deviates, {"deviation": 2.0}),
            (arm.refines(next(iter(arm.estimators), ""), 1), {"refine_steps": 1}),
        ):
            if supported:
                TrainConfig(**required, **settings)
                continue
            with refused(ConfigError, next(iter(settings)), name):
                TrainConfig(**required, **settings)
