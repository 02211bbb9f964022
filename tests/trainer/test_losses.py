"""Pseudo-labels, the scale of the loss, the cosine, and losses without randomness: of a mean, of stored members.

Shapes: K outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.support.exact import exact
from trainer import (
    Cosine,
    CrossEntropy,
    Draws,
    GroupLoss,
    Likelihood,
    SquaredError,
    gauss_newton,
    individual_loss,
    mean_only,
)

SHAPE = (1, 2, 3)
K = 4


def _draws(groups: int = 2) -> Draws:
    return Draws(range(groups))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network() -> nn.Sequential:
    layer = nn.Linear(6, K).double()
    layer.weight.data, layer.bias.data = _random(K, 6, seed=3) - 0.5, _random(K, seed=4)
    return nn.Sequential(nn.Flatten(), layer, nn.Tanh())


def _label(loss: Likelihood, outputs: Tensor, draws: Draws) -> Tensor:
    return loss.pseudo_label(outputs, loss.noise(outputs, draws))


def test_pseudo_labels_follow_the_density_of_the_loss() -> None:
    outputs = _random(1, K).expand(10_000, K)
    for scale in (1.0, 0.5):
        labels = _label(SquaredError(scale), outputs, _draws(len(outputs)))
        torch.testing.assert_close(labels.mean(0), outputs[0], rtol=0, atol=0.05)
        torch.testing.assert_close(labels.var(0), torch.full_like(outputs[0], 1 / (2 * scale)), rtol=0.08, atol=0)
    classes = _label(CrossEntropy(), outputs, _draws(len(outputs)))
    shares = torch.bincount(classes, minlength=K) / len(classes)
    torch.testing.assert_close(shares.double(), outputs[0].softmax(0), rtol=0, atol=0.024)


def test_no_gradient_flows_through_the_draw() -> None:
    outputs = _random(2, K).requires_grad_()
    assert not _label(SquaredError(), outputs, _draws()).requires_grad
    assert not _label(CrossEntropy(), outputs, _draws()).requires_grad


def test_mean_only_has_no_correction() -> None:
    network, mean, target = _network(), _random(2, *SHAPE), _random(2, K, seed=1)
    merged = mean_only(network, mean, torch.ones_like(mean), target, SquaredError())
    assert merged.correction is not None
    assert not merged.correction.any()
    torch.testing.assert_close(merged.loss, (network(mean) - target).square().sum(1))


def test_individual_loss_averages_within_groups_of_any_size() -> None:
    network, counts = _network().float(), [3, 1, 2]
    members = _random(6, *SHAPE).float()
    target = _random(3, K, seed=1).float()
    found = individual_loss(network, members, counts, target, SquaredError())
    groups = [members[:3], members[3:4], members[4:]]
    oracle = [((network(group) - y) ** 2).sum(1).mean() for group, y in zip(groups, target, strict=True)]
    torch.testing.assert_close(found.loss, torch.stack(oracle))
    assert found.correction is None


def test_correction_follows_the_scale_of_the_loss() -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    target = _random(2, K, seed=2)

    def correction(scale: float, estimate: Callable[..., GroupLoss]) -> Tensor:
        found = estimate(network, mean, variance, target, SquaredError(scale), _draws()).correction
        assert found is not None
        return found.detach()

    # The same noise is scaled in both, so the ratio is exact for the estimates too.
    for estimate in (exact, gauss_newton):
        torch.testing.assert_close(correction(1.0, estimate), 2 * correction(0.5, estimate), rtol=1e-10, atol=0)


def test_the_cosine_equals_numpys_and_ignores_lengths() -> None:
    outputs, target = _random(5, K) - 0.5, _random(5, K, seed=1) - 0.5
    found = Cosine().value(outputs, target)
    pairs = zip(outputs.numpy(), target.numpy(), strict=True)
    expected = [1 - np.dot(t, y) / np.linalg.norm(t) / np.linalg.norm(y) for t, y in pairs]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    torch.testing.assert_close(Cosine().value(1e3 * outputs, 1e-3 * target), found)
    torch.testing.assert_close(Cosine().value(-target, target), torch.full((5,), 2.0, dtype=torch.float64))


def test_the_cosine_of_nearly_parallel_outputs_keeps_its_digits() -> None:
    """Outputs at the start of a run are nearly parallel; then 1 − cos(t, y) in float32 is 0 or a multiple of 6e-8."""
    target = torch.tensor([[3.0, 4.0, 0.0]])
    outputs = target + torch.tensor([[0.0, 0.0, 1e-3]])  # an angle of 2e-4, whose cosine is 1 − 2e-8
    outputs.requires_grad_()
    loss = Cosine().value(outputs, target)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e-8, rel=1e-3)
    assert outputs.grad is not None
    torch.testing.assert_close(outputs.grad, torch.tensor([[0.0, 0.0, 4e-5]]), rtol=1e-3, atol=1e-8)


def test_the_hessian_of_the_cosine_is_indefinite() -> None:
    """tᵀ H t is 0 and H has a negative eigenvalue, while the Fisher matrix of a density is never indefinite."""
    outputs, target = _random(K), _random(1, K, seed=1)
    hessian = torch.autograd.functional.hessian(lambda t: Cosine().value(t[None], target).sum(), outputs)
    assert float(outputs @ hessian @ outputs) == pytest.approx(0, abs=1e-12)
    assert float(torch.linalg.eigvalsh(hessian)[0]) < -0.01
