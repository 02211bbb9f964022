"""The loss along factors against the mean loss of the group's members, in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import hessian, jacobian

from trainer.data.noise import Draws
from trainer.estimators import along_factors
from trainer.estimators.along_factors import gauss_newton_along_factors
from trainer.losses import CrossEntropy, Likelihood, SquaredError

SHAPE = (3, 2, 2)


def _group(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Members [N, C, H, W], their mean [1, C, H, W], and factors [1, N, C, H, W] that keep all of the covariance."""
    members = torch.from_numpy(np.random.default_rng(0).random((count, *SHAPE)))
    mean = members.mean(dim=0, keepdim=True)
    return members, mean, ((members - mean) / math.sqrt(count)).unsqueeze(0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_losses_of_a_linear_model_average_to_that_of_correlated_members(scale: float) -> None:
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


@pytest.mark.parametrize("loss", [SquaredError(1.0), SquaredError(0.5), CrossEntropy()])
def test_gauss_newton_averages_to_the_correction_with_the_whole_covariance(loss: Likelihood) -> None:
    """½ tr(Jᵀ H J C) with H from autograd, for a model that is linear in pixels, averaged over all signs."""
    members, mean, factors = _group(3)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4, dtype=torch.float64))
    squared = isinstance(loss, SquaredError)
    target = torch.randn(1, 4, dtype=torch.float64) if squared else torch.tensor([2])
    slope = jacobian(lambda x: model(x.reshape(1, *SHAPE))[0], mean.reshape(-1))
    curvature = hessian(lambda t: loss.value(t[None], target)[0], model(mean)[0].detach())
    centred = (members - mean).flatten(1)
    covariance = centred.T @ centred / len(members)
    expected = 0.5 * torch.trace(slope.T @ curvature @ slope @ covariance)
    found = []
    for signs in itertools.product((-1.0, 1.0), repeat=3):
        offset = torch.einsum("k,bkchw->bchw", torch.tensor(signs, dtype=torch.float64), factors)
        result = gauss_newton_along_factors(model, mean, target, loss, [offset])
        assert result.correction is not None
        torch.testing.assert_close(result.loss - result.correction, loss.value(model(mean), target))
        found.append(result.correction)
    torch.testing.assert_close(torch.stack(found).mean(), expected)


def test_antithetic_pairs_of_one_factor_have_no_noise() -> None:
    _, mean, factors = _group(3)
    weight = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def model(pixels: torch.Tensor) -> torch.Tensor:
        return (pixels.flatten(1) @ weight).unsqueeze(1) ** 3

    target, one = torch.zeros(1, 1, dtype=torch.float64), factors[:, :1]
    losses = {
        along_factors(model, mean, one, target, SquaredError(), Draws([seed]), estimator="antithetic").loss.item()
        for seed in range(8)
    }
    ends = [SquaredError().value(model(mean + sign * one[:, 0]), target).item() for sign in (-1, 1)]
    assert len(losses) <= 2  # the pair's two terms may be added in either order
    assert max(losses) == pytest.approx(sum(ends) / 2, rel=1e-12)
    assert min(losses) == pytest.approx(max(losses), rel=1e-12)


def test_parameter_gradients_of_gauss_newton_match_its_formula() -> None:
    """The formula for a linear model W x, by hand: ‖W x̄ − y‖² + ‖W u‖²."""
    _, mean, factors = _group(3)
    linear = torch.nn.Linear(12, 5, bias=False, dtype=torch.float64)
    target = torch.randn(1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    offset = factors[:, 0]
    gauss_newton_along_factors(
        torch.nn.Sequential(torch.nn.Flatten(), linear), mean, target, SquaredError(), [offset]
    ).loss.sum().backward()
    x, u = mean.flatten(), offset.flatten()
    by_hand = 2 * torch.outer(linear.weight @ x - target[0], x) + 2 * torch.outer(linear.weight @ u, u)
    assert linear.weight.grad is not None
    torch.testing.assert_close(linear.weight.grad, by_hand.detach())
