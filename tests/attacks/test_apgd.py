"""APGD: the schedule of its paper, bounds, the best iterate, and an independent implementation to compare with."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from datamerge.attacks import (
    APGD,
    PGD,
    Attacked,
    NonFiniteGradient,
    apgd,
    attack,
    cross_entropy,
    run_attack,
    sample_generators,
    squared_error,
)
from datamerge.attacks.apgd import checkpoints
from datamerge.encoders import load_encoder
from storage_schemas import ConfigError
from tests.support.refusals import refused

SHAPE = (2, 3, 4)
TWO, EIGHT = Fraction(2, 255), Fraction(8, 255)
MODEL = load_encoder("mlp:2x3x4-32-16-5")


def _images(seed: int, count: int = 3) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, *SHAPE)).astype(np.float32) / np.float32(255))


def _run(clean: Tensor, settings: APGD, seed: int = 0) -> Attacked:
    generators = sample_generators(seed, "k", len(clean))
    return apgd(MODEL, clean, torch.zeros(len(clean), 5), squared_error, settings, generators)


def test_checkpoints_of_the_paper() -> None:
    """Equation 2 at N = 100: p = 0, 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    assert sorted(checkpoints(100)) == [22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 10, 50):
        assert checkpoints(steps) <= set(range(1, steps + 1))
        assert checkpoints(steps)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([Fraction(1, 255), TWO, EIGHT, Fraction(5, 510) + Fraction(1, 255)]),
    st.integers(0, 12),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_results_stay_in_the_ball_and_do_not_lower_the_loss(
    epsilon: Fraction, steps: int, start: bool, grid: bool, seed: int
) -> None:
    clean = _images(seed)
    result = _run(clean, APGD(epsilon, steps, start, grid), seed)
    assert (result.loss >= result.start_loss).all()
    torch.testing.assert_close(
        result.loss, squared_error(MODEL(result.pixels), torch.zeros(3, 5)), rtol=1e-5, atol=1e-6
    )
    if grid:
        levels = (result.pixels.double() * 255).round()
        assert torch.equal(result.pixels, (levels / 255).float())
        assert (levels - (clean.double() * 255).round()).abs().max() <= int(epsilon * 255)
    else:
        assert (result.pixels.double() - clean.double()).abs().max() <= float(epsilon)
    assert result.pixels.min() >= 0
    assert result.pixels.max() <= 1


def _reference(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, steps: int) -> Tensor:
    """Algorithm 1 for one sample, in float64, written from the paper: f is maximised, W = checkpoints."""

    def f(point: Tensor) -> tuple[float, Tensor]:
        point = point.detach().requires_grad_()
        value = ((model(point[None])[0] - y) ** 2).sum()
        (gradient,) = torch.autograd.grad(value, point)
        return value.item(), gradient

    def project(point: Tensor) -> Tensor:
        return torch.clamp(torch.minimum(torch.maximum(point, x - epsilon), x + epsilon), 0, 1)

    eta, previous, point = 2 * epsilon, x.clone(), x.clone()
    value, gradient = f(point)
    best_value, best, best_gradient = value, point, gradient
    raised, since, halved_last, best_last = 0, 0, True, value
    for k in range(1, steps + 1):
        z = project(point + eta * gradient.sign())
        a = 0.75 if k > 1 else 1.0
        following = project(point + a * (z - point) + (1 - a) * (point - previous))
        previous, point = point, following
        new_value, gradient = f(point)
        raised, since, value = raised + (new_value > value), since + 1, new_value
        if value > best_value:
            best_value, best, best_gradient = value, point, gradient
        if k in checkpoints(steps):
            halve = raised <= 0.75 * since or (not halved_last and best_last >= best_value)
            halved_last, best_last, raised, since = halve, best_value, 0, 0
            if halve:
                eta, point, gradient = eta / 2, best, best_gradient
    return best


def test_agrees_with_an_independent_reference() -> None:
    model = load_encoder("mlp:2x3x4-32-16-5").double()
    clean = _images(5, 6).double()
    target = torch.zeros(6, 5, dtype=torch.float64)
    settings_ = APGD(EIGHT, 30, random_start=False, grid=False)
    found = apgd(model, clean, target, squared_error, settings_, sample_generators(0, "k", 6))
    for index in range(6):
        expected = _reference(model, clean[index], target[index], 8 / 255, 30)
        torch.testing.assert_close(found.pixels[index], expected, rtol=0, atol=1e-6)


def test_a_linear_classifier_is_attacked_to_its_optimum() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(24, 2)
    model, clean, labels = nn.Sequential(nn.Flatten(), linear), _images(2, 5), torch.zeros(5, dtype=torch.long)
    result = apgd(model, clean, labels, cross_entropy, APGD(EIGHT, 20), sample_generators(0, "k", 5))
    direction = (linear.weight[1] - linear.weight[0]).detach().sign().view(SHAPE)
    best = (clean.double() + 8 / 255 * direction.double()).clamp(0, 1)
    torch.testing.assert_close(result.pixels.double(), best, rtol=0, atol=1e-6)


def test_it_is_no_weaker_than_pgd_at_equal_cost() -> None:
    clean, target = _images(9, 64), torch.zeros(64, 5)
    generators = sample_generators(0, "k", 64)
    strong = apgd(MODEL, clean, target, squared_error, APGD(EIGHT, 20, grid=False), generators)
    pgd = PGD(EIGHT, Fraction(1, 255), 20, grid=False)
    plain = attack(MODEL, clean, target, squared_error, pgd, sample_generators(0, "k", 64))
    assert strong.loss.mean() >= 0.999 * plain.loss.mean()


def test_a_sample_with_a_non_finite_value_is_named() -> None:
    class Bad(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            outputs: Tensor = MODEL(pixels)
            white = pixels.flatten(1)[:, 0] > 0.9
            return outputs * torch.where(white, float("nan"), 1.0)[:, None]

    clean = torch.full((3, *SHAPE), 128 / 255)
    clean[1, 0, 0, 0] = 1.0
    names = ["ant", "bee", "cat"]
    with refused(NonFiniteGradient, None, "step 0 ", "bee") as caught:
        apgd(Bad(), clean, torch.zeros(3, 5), squared_error, APGD(TWO, 3), sample_generators(0, "k", 3), names)
    assert isinstance(caught.value, NonFiniteGradient)
    assert caught.value.indices == [1]


@pytest.mark.parametrize("settings_", [PGD(EIGHT, Fraction(1, 255), 3), APGD(EIGHT, 3)])
def test_restarts_keep_the_strongest(settings_: PGD | APGD) -> None:
    clean, target = _images(4, 8), torch.zeros(8, 5)

    def run(restarts: int) -> Attacked:
        generators = sample_generators(0, "k", 8)
        return run_attack(MODEL, clean, target, squared_error, settings_, generators, restarts=restarts)

    one, five = run(1), run(5)
    assert (five.loss >= one.loss).all()
    assert (five.loss > one.loss).any()
    torch.testing.assert_close(five.loss, squared_error(MODEL(five.pixels), target), rtol=1e-5, atol=1e-6)
    assert torch.equal(run(1).pixels, one.pixels)


def test_low_precision_keeps_a_float32_perturbation() -> None:
    """bfloat16 passes, float32 points: still on the grid, with losses in float32."""
    clean, target = _images(6, 8), torch.zeros(8, 5)
    for settings_ in (PGD(EIGHT, Fraction(1, 255), 5), APGD(EIGHT, 5)):
        generators = sample_generators(0, "k", 8)
        low = run_attack(MODEL, clean, target, squared_error, settings_, generators, precision="bfloat16")
        assert low.pixels.dtype == torch.float32
        assert torch.equal(low.pixels, ((low.pixels.double() * 255).round() / 255).float())
        torch.testing.assert_close(low.loss, squared_error(MODEL(low.pixels), target), rtol=1e-5, atol=1e-6)
        generators = sample_generators(0, "k", 8)
        full = run_attack(MODEL, clean, target, squared_error, settings_, generators)
        assert low.loss.mean() > 0.95 * full.loss.mean()
        assert not torch.equal(low.pixels, full.pixels)  # else nothing was computed in bfloat16


@pytest.mark.parametrize("make", [lambda r: APGD(TWO, 3, start_radius=r), lambda r: PGD(TWO, TWO, 3, start_radius=r)])
def test_start_radii_outside_the_ball_or_off_the_grid_are_refused(make: object) -> None:
    for radius in (EIGHT, Fraction(1, 1000)):
        with pytest.raises(ConfigError) as error:
            make(radius)  # type: ignore[operator]
        assert error.value.field == "start_radius"


def test_random_starts_stay_within_the_start_radius() -> None:
    clean = torch.full((50, *SHAPE), 128 / 255)
    for radius, levels in ((Fraction(0), 0), (Fraction(1, 255), 1)):
        pixels = _run(clean, APGD(EIGHT, 0, start_radius=radius)).pixels
        assert ((pixels - clean) * 255).round().abs().max() == levels
