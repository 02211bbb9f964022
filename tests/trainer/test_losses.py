"""Pseudo-labels, the scale of the loss, and the losses without randomness: of a mean, and of stored members.

Shapes: K outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.support.exact import exact
from trainer import CrossEntropy, Draws, GroupLoss, SquaredError, gauss_newton, individual_loss, mean_only
from trainer.losses import Loss

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


def _label(loss: Loss, outputs: Tensor, draws: Draws) -> Tensor:
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
