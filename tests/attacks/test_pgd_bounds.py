"""Results of PGD: inside the ball and the pixel range, on the 8-bit grid, with a loss of at least the start's."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamerge.attacks import PGD, attack, sample_generators, squared_error
from datamerge.encoders import load_encoder
from storage_schemas import ConfigError
from tests.support.refusals import refused

MODEL = load_encoder("mlp:2x3x4-8-5")
SHAPE = (2, 3, 4)


def _images(seed: int, grid: bool, count: int = 3) -> Tensor:
    """Random images in which about half of the pixels are black or white, where the range binds."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, (count, *SHAPE))
    values = rng.integers(0, 256, (count, *SHAPE)) / 255 if grid else rng.random((count, *SHAPE))
    return torch.from_numpy(np.where(kind == 0, 0.0, np.where(kind == 1, 1.0, values)).astype(np.float32))


def _run(clean: Tensor, pgd: PGD, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    target = torch.zeros(len(clean), 5)
    result = attack(MODEL, clean, target, squared_error, pgd, sample_generators(seed, "k", len(clean)))
    assert result.pixels.dtype == torch.float32
    torch.testing.assert_close(result.loss, squared_error(MODEL(result.pixels), target), rtol=1e-5, atol=1e-7)
    return result.pixels, result.start_loss, result.loss


LENGTHS = st.one_of(
    st.sampled_from([Fraction(1, 255), Fraction(2, 255), Fraction(8, 255), Fraction(3, 100), Fraction(1)]),
    st.fractions(Fraction(1, 255), Fraction(1, 2), max_denominator=1000),
)
STEP_SIZES = st.one_of(LENGTHS, st.sampled_from([Fraction(5, 510), Fraction(1, 1000), Fraction(2)]))


@settings(deadline=None, max_examples=80)
@given(LENGTHS, STEP_SIZES, st.integers(0, 6), st.booleans(), st.integers(0, 2**31))
def test_on_the_grid_every_bound_is_an_exact_integer(
    epsilon: Fraction, step_size: Fraction, steps: int, random_start: bool, seed: int
) -> None:
    clean = _images(seed, grid=True)
    pixels, start_loss, loss = _run(clean, PGD(epsilon, step_size, steps, random_start), seed)
    levels = (pixels.double() * 255).round()
    # Exactly the float32 number that stands for the level: nothing is lost when members are stored as uint8.
    assert torch.equal(pixels, (levels / 255).float())
    delta = levels - (clean.double() * 255).round()
    assert delta.abs().max() <= math.floor(epsilon * 255)
    assert levels.min() >= 0
    assert levels.max() <= 255
    assert (loss >= start_loss).all()


@settings(deadline=None, max_examples=80)
@given(
    st.one_of(LENGTHS, st.fractions(Fraction(1, 10**6), Fraction(1, 300))),
    STEP_SIZES,
    st.integers(0, 6),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_off_the_grid_bounds_hold_to_the_last_bit(
    epsilon: Fraction, step_size: Fraction, steps: int, random_start: bool, seed: int
) -> None:
    """Computed in float64 from the float32 results, without tolerance."""
    clean = _images(seed, grid=False)
    pixels, start_loss, loss = _run(clean, PGD(epsilon, step_size, steps, random_start, grid=False), seed)
    assert (pixels.double() - clean.double()).abs().max() <= float(epsilon)
    assert pixels.min() >= 0.0
    assert pixels.max() <= 1.0
    assert (loss >= start_loss).all()


@pytest.mark.parametrize("grid", [True, False])
def test_large_steps_reach_the_boundary_of_the_ball(grid: bool) -> None:
    """Off the grid, they end at the last float32 number inside it."""
    clean = _images(3, grid) * 0.5 + (64 / 255 if grid else 0.25)
    clean = (clean * 255).round() / 255 if grid else clean
    epsilon = Fraction(8, 255)
    pixels, _, _ = _run(clean, PGD(epsilon, Fraction(1), 5, grid=grid), 0)
    distance = (pixels.double() - clean.double()).abs()
    torch.testing.assert_close(distance, torch.full_like(distance, float(epsilon)), rtol=0, atol=1e-7)


def test_zero_steps_without_a_random_start_change_nothing() -> None:
    clean = _images(0, grid=True)
    pixels, start_loss, loss = _run(clean, PGD(Fraction(2, 255), Fraction(1, 255), 0, random_start=False), 0)
    assert torch.equal(pixels, clean)
    assert torch.equal(start_loss, loss)


def test_an_empty_ball_changes_nothing() -> None:
    for grid in (True, False):
        clean = _images(1, grid)
        pixels, _, _ = _run(clean, PGD(Fraction(0), Fraction(1, 255), 3, grid=grid), 0)
        assert torch.equal(pixels, clean)


def test_random_starts_cover_the_ball_evenly() -> None:
    """On the grid, the five levels of ε = 2/255 are equally frequent; off the grid, offsets are uniform."""
    clean = torch.full((200, *SHAPE), 128 / 255)
    levels = torch.round((_run(clean, PGD(Fraction(2, 255), Fraction(1, 255), 0), 0)[0] - clean) * 255)
    counts = [int((levels == level).sum()) for level in (-2, -1, 0, 1, 2)]
    assert sum(counts) == clean.numel()
    assert min(counts) > 0.9 * clean.numel() / 5
    offsets = _run(clean, PGD(Fraction(2, 255), Fraction(1, 255), 0, grid=False), 0)[0] - clean
    quartiles = torch.quantile(offsets.flatten() * 255, torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([-1.0, 0.0, 1.0]), rtol=0, atol=0.12)


@pytest.mark.parametrize("epsilon", [Fraction(1, 256), Fraction(1, 10**9)])
def test_a_ball_without_grid_points_is_refused(epsilon: Fraction) -> None:
    with refused(ConfigError, "epsilon", epsilon, "1/255", "grid=False"):
        PGD(epsilon, Fraction(1, 255), 1)
    PGD(epsilon, Fraction(1, 255), 1, grid=False)


def test_lengths_may_be_text_or_floats() -> None:
    exact = PGD(Fraction(2, 255), Fraction(1, 255), 10)
    assert PGD("2/255", 1 / 255, 10) == exact  # type: ignore[arg-type]  # as in a notebook
    for lengths in ({"epsilon": "two", "step_size": "1/255"}, {"epsilon": "2/255", "step_size": [1]}):
        with pytest.raises(ConfigError) as caught:
            PGD(**lengths, steps=1)
        assert caught.value.field in lengths
