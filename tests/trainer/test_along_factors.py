"""The loss along factors against the mean loss of the group's members, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from trainer.draws import Draws
from trainer.estimators import along_factors
from trainer.losses import SquaredError

SHAPE = (3, 2, 2)


def _group(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Members [N, C, H, W], their mean [1, C, H, W], and factors [1, N, C, H, W] that keep all of the covariance."""
    members = torch.from_numpy(np.random.default_rng(0).random((count, *SHAPE)))
    mean = members.mean(dim=0, keepdim=True)
    return members, mean, ((members - mean) / math.sqrt(count)).unsqueeze(0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_linear_model_has_the_loss_of_its_correlated_members(scale: float) -> None:
    members, mean, factors = _group(4)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5, dtype=torch.float64))
    target = torch.randn(1, 5, dtype=torch.float64)
    loss = SquaredError(scale)
    expected = loss.value(model(members), target.expand(4, -1)).mean()
    points = [
        mean + torch.einsum("k,bkchw->bchw", torch.tensor(signs, dtype=torch.float64), factors)
        for signs in itertools.product((-1.0, 1.0), repeat=4)
    ]
    assert torch.stack([loss.value(model(x), target) for x in points]).mean().item() == pytest.approx(
        expected.item(), abs=1e-12
    )
    draws = [
        along_factors(model, mean, factors, target, loss, Draws([seed]), samples=8).loss.item()
        for seed in range(2000)
    ]
    error = np.std(draws) / math.sqrt(len(draws))
    assert abs(np.mean(draws) - expected.item()) < 4 * error
    one = [along_factors(model, mean, factors, target, loss, Draws([seed])).loss.item() for seed in range(2000)]
    assert np.std(one) / np.std(draws) == pytest.approx(math.sqrt(8), rel=0.1)


def test_every_image_is_a_sigma_point_scaled_by_the_deviation() -> None:
    _, mean, factors = _group(3)
    seen: list[torch.Tensor] = []

    def model(pixels: torch.Tensor) -> torch.Tensor:
        seen.append(pixels)
        return pixels.flatten(1)

    along_factors(model, mean, factors[:, :1], mean.flatten(1), SquaredError(), Draws([3]), samples=16, deviation=2.0)
    offsets = seen[0] - mean
    assert {bool(torch.allclose(row, 2 * factors[0, 0])) for row in offsets} == {True, False}
    assert all(torch.allclose(row.abs(), 2 * factors[0, 0].abs()) for row in offsets)
