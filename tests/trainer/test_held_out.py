"""The held-out loss is the training loss: recomputed from the records, one group at a time, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder
from storage_schemas import ConfigError, Record, open_artifact
from tests.support.artifacts import same_groups
from tests.support.exact import exact
from tests.support.refusals import refused
from trainer import Draws, SquaredError, TrainConfig, train
from trainer.config import read_preset
from trainer.data.order import ESTIMATOR, WHOLE, Order, stream_seeds
from trainer.run.job import make_job

MakeArtifact = Callable[..., str]
SPEC, SEED, BATCH = "mlp:1x4x4-8-6", 5, 4
ATTACK = {"epsilon": "32/255", "step_size": "1/255", "steps": 10}
EPSILON = 32 / 255


def _held_out_loss(artifact: str, run: Path, **settings: Any) -> float:
    """Held-out loss of an encoder that has hardly been trained, on the training groups themselves."""
    shared: dict[str, Any] = {"steps": 1, "batch_size": BATCH, "learning_rate": 1e-12, "seed": SEED}
    train(TrainConfig(artifact=artifact, run=str(run), eval_artifact=same_groups(artifact), **{**shared, **settings}))
    return float(json.loads((run / "log.jsonl").read_text().splitlines()[-1])["eval_loss"])


def _encoder() -> Encoder:
    return load_encoder(SPEC).double().requires_grad_(False)


def _tensors(record: Record, *names: str) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(getattr(record, name))).double() for name in names]


def _loss(encoder: Encoder, image: Tensor, target: Tensor) -> Tensor:
    outputs: Tensor = encoder(image[None])[0]
    return (outputs - target).square().sum()


def test_held_out_deviations_are_those_of_training(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Preset `pair`: deviations of ±1.25 factors. With one factor, a mirrored pair has the mean loss exactly."""
    artifact, encoder = make_artifact(factors=1, spread=48), _encoder()
    preset = read_preset("pair")
    assert preset["deviation"] == 1.25
    found = _held_out_loss(artifact, tmp_path / "run", arm=preset["arm"], deviation=preset["deviation"])
    expected: dict[float, list[float]] = {1.0: [], 1.25: []}
    for record in open_artifact(artifact):
        mean, factors, target = _tensors(record, "mean", "factors", "target")
        for deviation, values in expected.items():
            values += [float(_loss(encoder, mean + s * deviation * factors[0], target)) for s in (-1, 1)]
    assert found == pytest.approx(np.mean(expected[1.25]), rel=1e-6)
    assert found != pytest.approx(np.mean(expected[1.0]), rel=1e-4)


@pytest.mark.parametrize("settings", [{"estimator": "sampled"}, {"estimator": "antithetic"}, {"samples": 2}], ids=str)
def test_random_deviations_are_measured_in_pairs(
    make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Pairs cancel what is linear in the deviation, so the loss is near the mean over all signs."""
    artifact, encoder = make_artifact(factors=3, spread=8), _encoder()
    found = _held_out_loss(artifact, tmp_path / "run", arm="factors", **settings)
    every, single = [], []
    for record in open_artifact(artifact):
        mean, factors, target = _tensors(record, "mean", "factors", "target")
        ends = [
            float(_loss(encoder, mean + torch.einsum("k,kchw->chw", torch.tensor(signs).double(), factors), target))
            for signs in product((-1.0, 1.0), repeat=3)
        ]
        every.append(np.mean(ends))
        single.append(np.std(ends))
    # Standard deviation of the mean over the groups, without pairs.
    noise = np.sqrt(np.square(single).sum()) / len(single)
    assert abs(found - np.mean(every)) < 0.2 * noise


def test_the_papers_held_out_loss_includes_its_correction(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact, encoder = make_artifact(), _encoder()
    found = _held_out_loss(artifact, tmp_path / "run", arm="avg", samples=300)
    values = []
    for record in open_artifact(artifact):
        mean, variance, target = _tensors(record, "mean", "variance", "target")
        merged = exact(encoder, mean[None], variance[None], target[None], SquaredError())
        assert merged.correction is not None
        values.append((float(merged.loss.detach()), float(merged.correction.detach())))
    loss, correction = np.mean(values, axis=0)
    assert abs(found - loss) < 0.05 * correction


def _refined(encoder: Encoder, start: Tensor, clean: Tensor, target: Tensor, steps: int) -> Tensor:
    lower, upper = (clean - EPSILON).clamp(min=0), (clean + EPSILON).clamp(max=1)
    image = start.clamp(lower, upper)
    for _ in range(steps):
        point = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(_loss(encoder, point, target), point)
        image = (image + 2 * EPSILON / steps * gradient.sign()).clamp(lower, upper)
    return image


@pytest.mark.parametrize("arm", ["ind", "mean-only", "factors"])
def test_held_out_images_are_refined_as_in_training(make_artifact: MakeArtifact, tmp_path: Path, arm: str) -> None:
    steps, deviation = 2, 1.5
    artifact, encoder = make_artifact(factors=2, spread=32, clean=True, attack=ATTACK), _encoder()
    settings: dict[str, Any] = {"arm": arm} | ({"deviation": deviation} if arm == "factors" else {})
    found = _held_out_loss(artifact, tmp_path / "refined", refine_steps=steps, **settings)
    stored = open_artifact(artifact)
    order, values = Order(stored.shard_sizes, BATCH, SEED), []
    for step in range(order.steps_per_epoch):
        indices = order.batch(step).tolist()
        draws = Draws(stream_seeds(SEED, ESTIMATOR, step, len(indices)))
        signs = draws.signs(torch.zeros(len(indices), 2, dtype=torch.float64))
        for index, drawn in zip(indices, signs, strict=True):
            mean, factors, members, clean, target = _tensors(
                stored[index], "mean", "factors", "members", "clean", "target"
            )
            starts = {
                "ind": list(members / 255),
                "mean-only": [mean],
                "factors": [mean + deviation * torch.einsum("k,kchw->chw", drawn, factors)],
            }[arm]
            refined = [_refined(encoder, start, clean / 255, target, steps) for start in starts]
            values.append(np.mean([float(_loss(encoder, image, target)) for image in refined]))
    assert found == pytest.approx(np.mean(values), rel=1e-5)
    assert found > _held_out_loss(artifact, tmp_path / "stored", **settings)


def test_measuring_the_held_out_loss_does_not_change_the_run(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """A run that measures after every step ends with the weights of one that never does."""
    artifact = make_artifact(clean=True, attack=ATTACK)
    settings: dict[str, Any] = {
        "arm": "ind",
        "refine_steps": 1,
        "steps": 7,
        "batch_size": BATCH,
        "freeze": ["1.bias"],
    }
    settings |= {"artifact": artifact, "learning_rate": 1e-2}
    without = train(TrainConfig(run=str(tmp_path / "without"), **settings))
    settings |= {"eval_artifact": same_groups(artifact), "eval_every": 1}
    assert train(TrainConfig(run=str(tmp_path / "with"), **settings)).encoder_sha256 == without.encoder_sha256


def test_held_out_groups_without_clean_images_are_refused_before_the_run(
    make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    artifact = make_artifact(attack=ATTACK, clean=True)
    other = make_artifact(name="other", attack=ATTACK)
    config = TrainConfig(
        artifact=artifact, run=str(tmp_path / "run"), steps=1, arm="mean-only", refine_steps=1, eval_artifact=other
    )
    with refused(ConfigError, "eval_artifact", "`keep_clean=True`", other):
        train(config)
    assert not (tmp_path / "run").exists()
    # Without refinement, clean images are not needed.
    train(config.model_copy(update={"refine_steps": 0}))


def test_few_held_out_groups_are_read_without_data_workers(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Workers would start again for each evaluation, which takes longer than reading the groups."""
    artifact = make_artifact()
    shared: dict[str, Any] = {"artifact": artifact, "eval_artifact": same_groups(artifact), "steps": 1}
    job = make_job(TrainConfig(**shared, run=str(tmp_path / "run"), batch_size=BATCH, data_workers=2))
    assert job.held_out is not None
    batches = job.held_out.feed(WHOLE, 0, 1)
    assert len(next(batches).keys) == BATCH
    assert active_children() == []
