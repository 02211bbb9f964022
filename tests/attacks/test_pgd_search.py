"""PGD against optima and a reference; its seeds; restored parameters; non-finite values."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datamerge.attacks import (
    PGD,
    Attacked,
    Ball,
    NonFiniteGradient,
    ascend,
    attack,
    cross_entropy,
    sample_generators,
    squared_error,
)
from datamerge.encoders import load_encoder
from tests.support.refusals import refused

SHAPE = (1, 4, 5)
ONE, TWO = Fraction(1, 255), Fraction(2, 255)


def _net(*widths: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    spec = "mlp:1x4x5-" + "-".join(str(width) for width in widths)
    return load_encoder(spec).to(dtype)


def _images(count: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (count, *SHAPE)).astype(np.float32) / np.float32(255))


def _attack(model: nn.Module, clean: Tensor, target: Tensor, pgd: PGD, key: str = "k") -> Attacked:
    return attack(model, clean, target, squared_error, pgd, sample_generators(7, key, len(clean)))


@pytest.mark.parametrize("grid", [True, False])
def test_a_linear_classifier_is_attacked_to_its_closed_form_optimum(grid: bool) -> None:
    """Two classes, logits Wx: the cross entropy of class 0 grows with (w1 − w0)·x, so x ± ε, clipped, is optimal."""
    torch.manual_seed(0)
    linear = nn.Linear(20, 2)
    model = nn.Sequential(nn.Flatten(), linear)
    clean = _images(6)
    labels = torch.zeros(6, dtype=torch.long)
    pgd = PGD(Fraction(4, 255), ONE, 10, grid=grid)
    result = attack(model, clean, labels, cross_entropy, pgd, sample_generators(0, "k", 6))
    direction = (linear.weight[1] - linear.weight[0]).detach().sign().view(SHAPE)
    best = (clean.double() + 4 / 255 * direction.double()).clamp(0, 1)
    torch.testing.assert_close(result.pixels.double(), best, rtol=0, atol=1e-7)
    expected = torch.logsumexp(model(best.float()), 1) - model(best.float())[:, 0]
    torch.testing.assert_close(result.loss, expected, rtol=1e-5, atol=1e-6)


def _naive(model: nn.Module, clean: Tensor, start: Tensor, target: Tensor, epsilon: float, alpha: float) -> Tensor:
    """Ten steps of PGD as the textbook has it, one sample at a time, with .backward(), in float64."""
    adversarial = []
    for x, x0, y in zip(clean, start, target, strict=True):
        point = x0.clone()
        for _ in range(10):
            point = point.detach().requires_grad_()
            loss = ((model(point[None])[0] - y) ** 2).sum()
            loss.backward()
            assert point.grad is not None
            step = point.detach() + alpha * torch.sign(point.grad)
            step = torch.minimum(torch.maximum(step, x - epsilon), x + epsilon)
            point = torch.clamp(step, 0.0, 1.0)
        adversarial.append(point.detach())
    return torch.stack(adversarial)


@pytest.mark.parametrize("grid", [True, False])
def test_agrees_with_an_independent_reference(grid: bool) -> None:
    model = _net(16, 16, 6)
    reference = _net(16, 16, 6, dtype=torch.float64)
    clean = _images(8)
    target = model(clean).detach()
    start = _attack(model, clean, target, PGD(TWO, ONE, 0, grid=grid)).pixels
    found = _attack(model, clean, target, PGD(TWO, ONE, 10, grid=grid))
    assert not torch.equal(found.pixels, start)
    expected = _naive(reference, clean.double(), start.double(), target.double(), 2 / 255, 1 / 255)
    assert (found.loss > found.start_loss).all()  # else the start was kept and this compares nothing
    # A gradient of nearly 0 may have either sign in the two precisions; whole trajectories do not.
    same = ((found.pixels.double() - expected).abs() < 1e-6).double().mean()
    assert same > 0.99
    torch.testing.assert_close(
        found.loss.double(), (reference(expected) - target.double()).square().sum(1), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("grid", [True, False])
def test_a_finished_attack_can_be_continued(grid: bool) -> None:
    """Three steps and two more from their result equal five steps, without further passes or random numbers."""
    model, clean = _net(16, 6), _images(5)
    target, passes = torch.zeros(5, 6), []
    short, whole = (_attack(model, clean, target, PGD(TWO, ONE, steps, grid=grid)) for steps in (3, 5))
    ball = Ball.around(clean, TWO, grid)

    def at(points: Tensor) -> tuple[Tensor, Tensor]:
        passes.append(1)
        pixels = (points / ball.scale).requires_grad_()
        loss = squared_error(model(pixels), target)
        return loss.detach(), torch.autograd.grad(loss.sum(), pixels)[0]

    points = (short.pixels * ball.scale).round() if grid else short.pixels.clone()
    start_loss = ascend(ball, at, points, float(ONE) * ball.scale, 2)
    assert start_loss is not None
    torch.testing.assert_close(start_loss, short.loss)
    torch.testing.assert_close(points / ball.scale, whole.pixels, rtol=0, atol=1e-7)
    assert len(passes) == 2
    assert ascend(ball, at, points, 1.0, 0) is None


def test_the_start_is_kept_if_steps_lower_the_loss() -> None:
    """The only step jumps over the peak of the objective."""

    class Peak(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            return -((pixels.flatten(1) - 0.5).square()).sum(1, keepdim=True)

    def height(outputs: Tensor, target: Tensor) -> Tensor:
        return outputs[:, 0]

    clean = torch.full((4, *SHAPE), 128 / 255)
    pgd = PGD(Fraction(100, 255), Fraction(100, 255), 1, random_start=False)
    result = attack(Peak(), clean, torch.zeros(4), height, pgd, sample_generators(0, "k", 4))
    assert torch.equal(result.pixels, clean)
    assert torch.equal(result.loss, result.start_loss)


def test_more_steps_find_higher_losses() -> None:
    model, clean = _net(32, 6), _images(16)
    target = model(clean).detach()
    losses = [float(_attack(model, clean, target, PGD(TWO, ONE, n)).loss.mean()) for n in (0, 1, 3, 10)]
    assert losses == sorted(losses)
    assert losses[-1] > 1.5 * losses[0]


def test_samples_do_not_depend_on_their_neighbours() -> None:
    """Alone, in a batch, in another order: the same pixels for the same generator."""
    model = _net(16, 6, dtype=torch.float64)  # batched kernels round alike here
    clean = _images(5).double()
    target = model(clean).detach()
    keys = [f"k{number}" for number in range(5)]

    def run(order: list[int]) -> Tensor:
        generators = [sample_generators(7, keys[i], 1)[0] for i in order]
        return attack(model, clean[order], target[order], squared_error, PGD(TWO, ONE, 5), generators).pixels

    together = run([0, 1, 2, 3, 4])
    assert torch.equal(run([3, 1, 4, 0, 2]), together[[3, 1, 4, 0, 2]])
    for index in range(5):
        assert torch.equal(run([index]), together[[index]])
    assert len({tuple((row - x).flatten().tolist()) for row, x in zip(together, clean, strict=True)}) == 5


def test_generators_are_functions_of_seed_and_key() -> None:
    def draws(seed: int, key: str, count: int) -> list[list[int]]:
        return [generator.integers(0, 2**62, 4).tolist() for generator in sample_generators(seed, key, count)]

    np.random.seed(1)
    first = draws(7, "k", 3)
    np.random.seed(2)
    assert draws(7, "k", 3) == first
    assert draws(7, "k", 5)[:3] == first  # more members leave the earlier ones alone
    streams = [tuple(row) for seed in (7, 8) for key in ("k", "k0", "猫") for row in draws(seed, key, 3)]
    assert len(set(streams)) == 18


def test_the_stream_is_part_of_the_format() -> None:
    """A release that draws other numbers would write other artifacts from the same command."""
    (generator,) = sample_generators(7, "photo-1", 1)
    assert generator.integers(0, 1000, 5).tolist() == [193, 854, 591, 458, 851]


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_are_restored(fails: bool) -> None:
    """Gradients, flags and values are as before, also after an exception."""
    model = _net(16, 6)
    parameters = list(model.parameters())
    parameters[1].requires_grad_(False)
    before = [parameter.clone() for parameter in parameters]
    calls = 0

    def objective(outputs: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        assert not any(parameter.requires_grad for parameter in parameters)
        if fails and calls == 3:
            raise RuntimeError("out of memory")
        return squared_error(outputs, target)

    clean = _images(2)
    arguments = (model, clean, torch.zeros(2, 6), objective, PGD(TWO, ONE, 4), sample_generators(0, "k", 2))
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            attack(*arguments)
    else:
        assert not attack(*arguments).pixels.requires_grad
    assert [parameter.requires_grad for parameter in parameters] == [True, False, True, True]
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    assert not clean.requires_grad


class Poisoned(nn.Module):
    """Multiplies outputs by `value` for samples whose first pixel is white, after `first` calls."""

    def __init__(self, value: float, first: int) -> None:
        super().__init__()
        self.inner, self.value, self.first, self.calls = _net(8, 6), value, first, 0

    def forward(self, pixels: Tensor) -> Tensor:
        self.calls += 1
        outputs: Tensor = self.inner(pixels)
        bad = (pixels.flatten(1)[:, 0] > 0.9) & (self.calls > self.first)
        # One factor a sample: torch.where on the outputs would give every sample a NaN gradient.
        return outputs * torch.where(bad, self.value, 1.0)[:, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("first", [0, 2, 3], ids=["at the start", "midway", "only the last iterate"])
def test_samples_with_non_finite_values_are_named(value: float, first: int) -> None:
    """NaN, an infinity, or a loss that overflows float32: never zeroed, never stored."""
    clean = torch.full((4, *SHAPE), 128 / 255)
    clean[1, 0, 0, 0] = clean[3, 0, 0, 0] = 1.0
    arguments = (Poisoned(value, first), clean, torch.zeros(4, 6), squared_error, PGD(TWO, ONE, 3))
    with refused(NonFiniteGradient, None, f"step {first} ", "bee, dog") as caught:
        attack(*arguments, sample_generators(0, "k", 4), ["ant", "bee", "cat", "dog"])
    assert isinstance(caught.value, NonFiniteGradient)
    assert caught.value.indices == [1, 3]


def test_samples_without_names_are_named_by_position() -> None:
    clean = torch.ones((8, *SHAPE))
    with refused(NonFiniteGradient, None, "step 0 ", "sample 0, sample 1", " 3 ") as caught:
        _attack(Poisoned(float("nan"), 0), clean, torch.zeros(8, 6), PGD(TWO, ONE, 1))
    assert isinstance(caught.value, NonFiniteGradient)
    assert caught.value.indices == list(range(8))


Objective = Callable[[Tensor, Tensor], Tensor]


@pytest.mark.parametrize("batch", [1, 3])
def test_objectives_are_per_sample(batch: int) -> None:
    outputs = torch.randn(batch, 4, generator=torch.Generator().manual_seed(0))
    target = torch.randn(batch, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(batch)
    expected = [
        sum((a - b) ** 2 for a, b in zip(o, t, strict=True))
        for o, t in zip(outputs.tolist(), target.tolist(), strict=True)
    ]
    assert squared_error(outputs, target).tolist() == pytest.approx(expected, rel=1e-5)
    manual = [
        -torch.log(torch.exp(row)[label] / torch.exp(row).sum()).item()
        for row, label in zip(outputs, labels, strict=True)
    ]
    assert cross_entropy(outputs, labels).tolist() == pytest.approx(manual, rel=1e-4)
