"""Refined stored images: the arithmetic of PGD, inside the ball, and runs that continue to the same bits."""

from __future__ import annotations

import signal
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datamerge.attacks import PGD, attack, squared_error
from datamerge.encoders import load_encoder
from merge_service import MergeConfig
from storage_schemas import ConfigError, open_artifact
from tests.support.merging import merge_here
from tests.support.refusals import refused
from trainer import Stopped, TrainConfig, train
from trainer.data.noise import Draws
from trainer.losses import SquaredError
from trainer.run.clean_images import clean_name
from trainer.run.refine import Refinement, refine
from trainer.run.requirements import check

MakeArtifact = Callable[..., str]
ENCODER = "mlp:1x4x4-8-6"
ATTACK = {"epsilon": "8/255", "step_size": "1/255", "steps": 10}
EPSILON = 8 / 255


def _images(count: int) -> torch.Tensor:
    rng = np.random.default_rng(5)
    return torch.from_numpy(rng.integers(0, 256, (count, 1, 4, 4))).float() / 255


@pytest.mark.parametrize("steps", [1, 3])
def test_refinement_equals_pgd_from_a_given_start(steps: int) -> None:
    encoder, clean = load_encoder(ENCODER).eval(), _images(7)
    target = torch.zeros(7, 6)
    settings = PGD(Fraction(8, 255), Fraction(3, 255), steps, random_start=False, grid=False)
    generators = [np.random.default_rng(0)] * 7
    expected = attack(encoder, clean, target, squared_error, settings, generators)
    found = refine(encoder, clean, clean, target, SquaredError(), Refinement(steps, 3 / 255, EPSILON))
    torch.testing.assert_close(found, expected.pixels, atol=1e-6, rtol=0)
    assert (found - clean).abs().max() > 0.9 * min(3 * steps, 8) / 255


def test_a_linear_model_is_pushed_along_the_sign_of_its_weights() -> None:
    weight = torch.linspace(-1, 1, 16).reshape(1, 16) + 0.01
    points = refine(
        lambda pixels: pixels.flatten(1) @ weight.T,
        torch.full((1, 1, 4, 4), 0.5),
        torch.full((1, 1, 4, 4), 0.5),
        torch.full((1, 1), -10.0),  # below every output: the loss grows with the output
        SquaredError(),
        Refinement(1, 0.25, 0.125),
    )
    torch.testing.assert_close(points, 0.5 + 0.125 * weight.sign().reshape(1, 1, 4, 4))


def test_points_outside_are_projected_and_parameters_get_no_gradient() -> None:
    encoder, clean = load_encoder(ENCODER), _images(5)
    far = clean + torch.linspace(-1, 1, 16).reshape(1, 1, 4, 4)
    given = far.clone()
    found = refine(encoder, far, clean, torch.zeros(5, 6), SquaredError(), Refinement(2, 1 / 255, EPSILON))
    assert (found - clean).abs().max() <= EPSILON + 1e-6
    assert found.min() >= 0
    assert found.max() <= 1
    assert torch.equal(far, given)
    assert not found.requires_grad
    assert all(parameter.grad is None and parameter.requires_grad for parameter in encoder.parameters())


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    shared = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "refine_steps": 1}
    return TrainConfig(artifact=artifact, run=str(run), **{**shared, **settings})


@pytest.mark.parametrize("arm", ["random-member", "ind", "mean-only", "clean"])
def test_refinement_changes_the_weights_of_a_run(make_artifact: MakeArtifact, tmp_path: Path, arm: str) -> None:
    artifact = make_artifact(attack=ATTACK, clean=True)
    train(_config(artifact, tmp_path / "refined", arm=arm))
    train(_config(artifact, tmp_path / "plain", arm=arm, refine_steps=2 if arm == "clean" else 0))
    refined, plain = (load_file(tmp_path / name / "encoder.safetensors") for name in ("refined", "plain"))
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in refined.items())


def test_a_refined_run_can_be_accumulated_and_continued(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(attack=ATTACK, clean=True)
    train(_config(artifact, tmp_path / "whole", arm="random-member"))
    train(_config(artifact, tmp_path / "cut", arm="random-member", accumulate=2))
    from trainer.run import update

    step, calls = update.Optimisation.step, []

    def interrupted(self: update.Optimisation, *arguments: Any) -> update.Outcome:
        calls.append(0)
        outcome = step(self, *arguments)
        return outcome._replace(stop=signal.SIGTERM if len(calls) == 3 else 0)

    monkeypatch.setattr(update.Optimisation, "step", interrupted)
    with pytest.raises(Stopped):
        train(_config(artifact, tmp_path / "stopped", arm="random-member"))
    train(_config(artifact, tmp_path / "stopped", arm="random-member"))
    whole, stopped, cut = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped", "cut"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, stopped[name]), name
        torch.testing.assert_close(tensor, cut[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("settings", "expected"), [({}, 8 / 255), ({"refine_step_size": "1/255"}, 1 / 255)])
def test_the_step_size_is_set_or_follows_from_epsilon(
    make_artifact: MakeArtifact, settings: dict[str, Any], expected: float
) -> None:
    artifact = make_artifact(attack=ATTACK, clean=True)
    config = _config(artifact, Path("run"), arm="ind", refine_steps=2, **settings)
    found = check(config, open_artifact(artifact).manifest).refinement
    assert found is not None
    assert found == pytest.approx((2, expected, EPSILON, 0))


def test_an_artifact_without_clean_images_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    attacked, clean = make_artifact(attack=ATTACK), make_artifact(name="other", clean=True)
    with refused(ConfigError, "refine_steps", attacked, "`keep_clean=True`"):
        train(_config(attacked, tmp_path / "run", arm="random-member"))
    with refused(ConfigError, "arm", attacked, "`keep_clean=True`"):
        train(_config(attacked, tmp_path / "run", arm="clean"))
    with refused(ConfigError, "epsilon", clean):
        train(_config(clean, tmp_path / "run", arm="random-member"))


@pytest.mark.parametrize(
    "settings",
    [{"arm": "avg"}, {"arm": "factors", "estimator": "antithetic"}, {"arm": "factors", "samples": 2}],
)
def test_only_single_images_are_refined(settings: dict[str, Any]) -> None:
    with refused(ConfigError, "refine_steps", settings["arm"]):
        _config("artifact", Path("run"), **settings)


def test_a_step_size_without_steps_is_refused() -> None:
    with refused(ConfigError, "refine_step_size", "`refine_steps`"):
        _config("artifact", Path("run"), arm="ind", refine_steps=0, refine_step_size="1/255")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (8 / 255, 8 / 255)),
        ({"epsilon": "4/255"}, (4 / 255, 4 / 255)),
        ({"epsilon": "4/255", "start_noise": "1/255"}, (4 / 255, 1 / 255)),
        ({"arm": "random-member"}, (8 / 255, 0)),
        ({"arm": "random-member", "start_noise": "2/255"}, (8 / 255, 2 / 255)),
    ],
)
def test_epsilon_and_start_noise_are_set_or_follow_from_the_attack(
    make_artifact: MakeArtifact, settings: dict[str, Any], expected: tuple[float, float]
) -> None:
    artifact = make_artifact(attack=ATTACK, clean=True)
    found = check(_config(artifact, Path("run"), **{"arm": "clean", **settings}), open_artifact(artifact).manifest)
    assert found.refinement is not None
    assert (found.refinement.epsilon, found.refinement.noise) == pytest.approx(expected)
    assert found.clean == "clean"


def test_radii_that_do_not_fit_are_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    attacked = make_artifact(attack=ATTACK, clean=True)
    with refused(ConfigError, "start_noise", "clean"):
        _config(attacked, tmp_path, arm="clean", start_noise=0)
    with refused(ConfigError, "epsilon", "4/255", "8/255"):
        train(_config(attacked, tmp_path / "run", arm="random-member", epsilon="4/255"))
    with refused(ConfigError, "epsilon", "0"):
        _config(attacked, tmp_path, arm="clean", epsilon=0)


def test_noise_wider_than_epsilon_is_not_projected() -> None:
    """N-FGSM: noise of twice the radius, a step of the radius, and no projection but that onto [0, 1]."""
    encoder, clean = load_encoder(ENCODER), _images(5)
    points = clean + torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4) * EPSILON
    wide = Refinement(1, EPSILON, EPSILON, noise=2 * EPSILON)
    found = refine(encoder, points, clean, torch.zeros(5, 6), SquaredError(), wide)
    pixels = points.clamp(0, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(pixels).square().sum(), pixels)
    torch.testing.assert_close(found, (pixels.detach() + EPSILON * gradient.sign()).clamp(0, 1))
    assert (found - clean).abs().max() > 2.5 * EPSILON


def test_refinement_disables_dropout() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 6))
    clean = _images(5)
    found = [refine(model, clean, clean, torch.zeros(5, 6), SquaredError(), Refinement(2, 0.01, 0.1)) for _ in "ab"]
    assert torch.equal(*found)
    assert all(module.training for module in model.modules())


def test_noise_is_uniform_and_depends_on_its_group_alone() -> None:
    like = torch.zeros(3, 1, 100, 100)
    found = Draws([4, 5, 6]).uniform(like)
    assert found.dtype == torch.float32
    assert found.abs().max() <= 1
    counts = torch.histc(found, 20, -1, 1)
    expected = found.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8  # χ², 19 degrees of freedom, p = .001
    assert torch.equal(Draws([5]).uniform(like[:1])[0], found[1])
    assert torch.equal(Draws([5]).uniform(like[:1, :, :50])[0], found[1, :, :50])


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [
        ({"attack": None, "grouping": {"kind": "adversarial", "members": 1}}, "mean"),
        ({"grouping": {"kind": "label", "members": 1}}, "mean"),
        ({"grouping": {"kind": "label", "members": None}}, None),
        ({"attack": ATTACK, "grouping": {"kind": "adversarial", "members": 1}}, None),
        # Unions of attacks with two radii, and of attacks and clean images, record only what they share.
        ({"attack": {"kind": "pgd"}, "grouping": {"kind": "adversarial", "members": 1}}, None),
        ({"grouping": {"kind": "adversarial", "members": 1}}, None),
        ({"grouping": {"members": 1}}, None),
    ],
)
def test_which_quantity_is_the_clean_image(
    make_artifact: MakeArtifact, provenance: dict[str, Any], expected: str | None
) -> None:
    manifest = open_artifact(make_artifact()).manifest
    assert clean_name(manifest.model_copy(update={"provenance": provenance})) == expected


def test_an_encoder_is_not_trained_towards_its_own_outputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.random.default_rng(3).integers(0, 256, (9, 4, 4), np.uint8))
    config = MergeConfig(source=str(tmp_path / "x.npz"), artifact=str(tmp_path / "a"), encoder=ENCODER, attack="none")
    clean = merge_here(config).location.url
    for arm in ("clean", "mean-only"):
        with refused(ConfigError, "refine_steps", "0", clean):
            train(_config(clean, tmp_path / arm, arm=arm, refine_steps=0))
    train(_config(clean, tmp_path / "other", arm="clean", refine_steps=0, encoder="mlp:1x4x4-6"))
    train(_config(clean, tmp_path / "attacked", arm="clean", epsilon="8/255"))
