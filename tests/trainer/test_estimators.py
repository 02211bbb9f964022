"""The merged loss against oracles obtained another way, in float64.

Shapes: B groups, D pixel values, K outputs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from tests.support.exact import dense_diagonal, exact
from trainer import (
    CrossEntropy,
    Draws,
    GroupLoss,
    Likelihood,
    Loss,
    SquaredError,
    antithetic,
    gauss_newton,
    mean_only,
    sampled,
)
from trainer.estimators.gauss_newton import diagonal_estimate

SHAPE = (1, 2, 3)
D, K = 6, 4


def _draws(groups: int = 2, seed: int = 0) -> Draws:
    return Draws([seed * 1_000_003 + group for group in range(groups)])


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network(seed: int = 0) -> nn.Sequential:
    """A smooth network, so that nothing depends on where a ReLU has its kink."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, K)).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data = _random(*parameter.shape, seed=100 * seed + index) - 0.5
    return network


def _linear() -> nn.Sequential:
    layer = nn.Linear(D, K).double()
    layer.weight.data, layer.bias.data = _random(K, D, seed=1) - 0.5, _random(K, seed=2)
    return nn.Sequential(nn.Flatten(), layer)


def _diagonal(network: nn.Module, inputs: Tensor, output_hessian: Callable[[Tensor], Tensor]) -> Tensor:
    """diag[Jᵀ H J] of each row by its definition: Jacobians from torch.func, H as given."""

    def outputs(pixels: Tensor) -> Tensor:
        return functional_call(network, dict(network.named_parameters()), (pixels[None],))[0]  # type: ignore[no-any-return]

    rows = []
    for pixels in inputs:
        jacobian = jacrev(outputs)(pixels).reshape(K, D)
        rows.append(torch.diagonal(jacobian.T @ output_hessian(outputs(pixels)) @ jacobian).reshape(SHAPE))
    return torch.stack(rows)


def _softmax_hessian(logits: Tensor) -> Tensor:
    p = torch.exp(logits) / torch.exp(logits).sum()
    return torch.diag(p) - torch.outer(p, p)


def _estimate(network: nn.Module, inputs: Tensor, loss: Likelihood, samples: int, seed: int = 0) -> Tensor:
    pixels = inputs.clone().requires_grad_()
    return diagonal_estimate(network(pixels), pixels, loss, _draws(len(inputs), seed), samples).detach()


def _exact(network: nn.Module, inputs: Tensor, loss: Loss) -> Tensor:
    pixels = inputs.clone().requires_grad_()
    return dense_diagonal(network(pixels), pixels, loss).detach()


def _target(loss: Loss, groups: int = 2) -> Tensor:
    return _random(groups, K, seed=2) if isinstance(loss, SquaredError) else torch.arange(groups) % K


def _group() -> tuple[Tensor, Tensor, Tensor]:
    """Members of a group with diagonal covariance, their mean and variance."""
    centre, deviations = _random(*SHAPE, seed=3), torch.diag(0.1 + _random(D, seed=4)).reshape(D, *SHAPE)
    members = torch.cat([centre + deviations, centre - deviations])
    mean = members.mean(0, keepdim=True)
    return members, mean, ((members - mean) ** 2).mean(0, keepdim=True)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_model_and_diagonal_covariance_give_the_group_loss_exactly(scale: float) -> None:
    network, (members, mean, variance) = _linear(), _group()
    target = _random(1, K, seed=5)
    # Eq. 1, written out.
    group = torch.stack([scale * ((network(x[None]) - target) ** 2).sum() for x in members]).mean()
    merged = exact(network, mean, variance, target, SquaredError(scale))
    assert merged.correction is not None
    assert merged.loss.shape == (1,)
    torch.testing.assert_close(merged.loss[0], group, rtol=0, atol=1e-10)
    assert merged.correction[0] > 1e-2


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("estimate", [gauss_newton, sampled, antithetic])
def test_random_estimates_average_to_the_group_loss_of_a_linear_model(
    estimate: Callable[..., GroupLoss], scale: float
) -> None:
    network, (members, mean, variance) = _linear(), _group()
    target, repeats = _random(1, K, seed=5), 4000
    group = _group_loss(network, members, target, scale)
    values = estimate(
        network,
        mean.expand(repeats, *SHAPE),
        variance.expand(repeats, *SHAPE),
        target.expand(repeats, K),
        SquaredError(scale),
        _draws(repeats),
    ).loss.detach()
    assert abs(float(values.mean() - group)) < 4.5 * float(values.std()) / math.sqrt(repeats)
    # The bound is tight: less than half of the correction.
    correction = float(group - _group_loss(network, mean, target, scale))
    assert 4.5 * float(values.std()) / math.sqrt(repeats) < 0.5 * correction


def _group_loss(network: nn.Module, members: Tensor, target: Tensor, scale: float) -> Tensor:
    outputs: Tensor = network(members)
    return scale * ((outputs - target) ** 2).sum(1).mean().detach()


def _all_signs() -> Tensor:
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=D)), dtype=torch.float64).reshape(-1, *SHAPE)


class _AllSigns(Draws):
    """Draws every combination of signs once, so that averages over rows are expectations."""

    def __init__(self) -> None:
        super().__init__([])

    def signs(self, like: Tensor) -> Tensor:
        return _all_signs()


def _over_all_signs(estimate: Callable[..., GroupLoss], model: Any, loss: Loss) -> tuple[Tensor, Tensor]:
    mean, variance, target = _random(1, *SHAPE), 0.05 * _random(1, *SHAPE, seed=1), _target(loss, 1)
    rows = 2**D
    expanded = _repeat(rows, mean, variance, target)
    return estimate(model, *expanded, loss, _AllSigns()).loss.detach(), variance


@pytest.mark.parametrize("loss", [SquaredError(1.0), CrossEntropy()])
def test_sampled_and_antithetic_average_to_the_mean_over_the_cloud(loss: Loss) -> None:
    network, mean = _network(), _random(1, *SHAPE)
    values, variance = _over_all_signs(sampled, network, loss)
    pairs, _ = _over_all_signs(antithetic, network, loss)
    cloud = mean + variance.sqrt() * _all_signs()
    oracle = torch.stack([loss.value(network(x[None]), _target(loss, 1))[0] for x in cloud]).detach()
    torch.testing.assert_close(values.mean(), oracle.mean(), rtol=0, atol=1e-12)
    torch.testing.assert_close(pairs.mean(), oracle.mean(), rtol=0, atol=1e-12)
    # Pairs cancel the first order, which leaves little noise.
    assert pairs.std() < 0.5 * values.std()


class _Quadratic(nn.Module):
    """f(x) = A x + ½ xᵀ B_k x for each output k: the curvature of f itself enters the full Hessian, not the GGN."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(_random(K, D, seed=6) - 0.5)
        b = _random(K, D, D, seed=7) - 0.5
        self.b = nn.Parameter(b + b.transpose(1, 2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = pixels.flatten(1)
        return x @ self.a.T + 0.5 * torch.einsum("ni,kij,nj->nk", x, self.b, x)


@pytest.mark.parametrize("loss", [SquaredError(1.0), SquaredError(0.5), CrossEntropy()])
def test_quadratic_model_has_the_closed_form_correction(loss: Loss) -> None:
    model, mean, variance = _Quadratic(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    found = exact(model, mean, variance, _target(loss), loss).correction
    assert found is not None
    x, v = mean.flatten(1), variance.flatten(1)
    jacobian = model.a + torch.einsum("kij,nj->nki", model.b, x)
    outputs = model(mean)
    if isinstance(loss, SquaredError):
        oracle = loss.scale * torch.einsum("nki,ni->n", jacobian**2, v)
    else:
        p = outputs.softmax(1)
        first = torch.einsum("nk,nki->ni", p, jacobian)
        oracle = 0.5 * ((torch.einsum("nk,nki->ni", p, jacobian**2) - first**2) * v).sum(1)
    torch.testing.assert_close(found, oracle, rtol=0, atol=1e-10)


def test_antithetic_has_the_full_hessian_where_exact_has_the_ggn() -> None:
    """For small deviations: (pair − L(x̄)) / t² → ½ (√v∘z)ᵀ ∇²L (√v∘z), which averages to ½ vᵀ diag ∇²L."""
    model, loss = _Quadratic(), SquaredError()
    mean, variance, target = _random(1, *SHAPE), _random(1, *SHAPE, seed=1), _random(1, K, seed=2)

    def value(pixels: Tensor) -> Tensor:
        return loss.value(model(pixels[None]), target)[0]

    curvature = torch.diagonal(jacrev(jacrev(value))(mean[0]).reshape(D, D)).detach()
    full = 0.5 * (variance.flatten() * curvature).sum()
    t, rows = 1e-3, 2**D
    pairs = antithetic(
        model,
        mean.expand(rows, *SHAPE),
        t**2 * variance.expand(rows, *SHAPE),
        target.expand(rows, K),
        loss,
        _AllSigns(),
    ).loss.detach()
    found = ((pairs.mean() - value(mean[0])) / t**2).detach()
    torch.testing.assert_close(found, full, rtol=1e-4, atol=0)
    ggn = exact(model, mean, variance, target, loss).correction
    assert ggn is not None
    assert abs(float(ggn[0].detach() - full)) > 0.05 * abs(float(full))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_exact_squared_error_matches_dense_oracle(scale: float) -> None:
    network, inputs = _network(), _random(3, *SHAPE)
    oracle = _diagonal(network, inputs, lambda outputs: 2 * scale * torch.eye(K, dtype=torch.float64))
    torch.testing.assert_close(_exact(network, inputs, SquaredError(scale)), oracle, rtol=0, atol=1e-10)


def test_exact_cross_entropy_matches_dense_oracle() -> None:
    network, inputs = _network(), _random(3, *SHAPE)
    oracle = _diagonal(network, inputs, _softmax_hessian)
    torch.testing.assert_close(_exact(network, inputs, CrossEntropy()), oracle, rtol=0, atol=1e-10)


def test_all_cross_entropy_labels_weighted_by_their_probability_give_the_exact_diagonal() -> None:
    network, pixels = _network(), _random(2, *SHAPE).requires_grad_()
    outputs = network(pixels)
    probabilities = outputs.softmax(1).detach()
    total = torch.zeros_like(pixels)
    for label in range(K):
        value = CrossEntropy().value(outputs, torch.full((2,), label)).sum()
        gradient = torch.autograd.grad(value, pixels, retain_graph=True)[0]
        total += probabilities[:, label, None, None, None] * gradient.square()
    oracle = _diagonal(network, pixels.detach(), _softmax_hessian)
    torch.testing.assert_close(total, oracle, rtol=0, atol=1e-10)


@pytest.mark.parametrize("loss", [SquaredError(1.0), SquaredError(0.5), CrossEntropy()])
def test_estimate_converges_at_the_monte_carlo_rate(loss: Likelihood) -> None:
    network, inputs = _network(), _random(1, *SHAPE)
    oracle = _exact(network, inputs, loss)
    repeats, errors = 400, {}
    for samples in (1, 4, 16):
        # Every row of the batch draws its own labels: `repeats` independent estimates in one call.
        estimates = _estimate(network, inputs.expand(repeats, *SHAPE), loss, samples, seed=samples)
        standard_error = estimates.std(0) / math.sqrt(repeats)
        assert ((estimates.mean(0) - oracle[0]).abs() < 4.5 * standard_error).all()
        errors[samples] = float((estimates - oracle).square().mean().sqrt())
    assert errors[1] / errors[4] == pytest.approx(2, rel=0.25)
    assert errors[4] / errors[16] == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("loss", [SquaredError(1.0), SquaredError(0.5), CrossEntropy()])
def test_parameter_gradients_match_the_dense_oracle(loss: Loss) -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    target, parameters = _target(loss), list(network.parameters())
    found = torch.autograd.grad(exact(network, mean, variance, target, loss).loss.sum(), parameters)

    def output_hessian(outputs: Tensor) -> Tensor:
        if isinstance(loss, SquaredError):
            return 2 * loss.scale * torch.eye(K, dtype=torch.float64)
        return _softmax_hessian(outputs)

    outputs = network(mean)
    if isinstance(loss, SquaredError):
        value = loss.scale * (outputs - target).square().sum()
    else:
        value = functional.cross_entropy(outputs, target, reduction="sum")
    oracle = value + 0.5 * (variance * _diagonal(network, mean, output_hessian)).sum()
    for mine, theirs in zip(found, torch.autograd.grad(oracle, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        assert theirs.abs().max() > 1e-4


@pytest.mark.parametrize("loss", [SquaredError(1.0), CrossEntropy()])
def test_parameter_gradients_of_the_estimate_converge_to_those_of_exact(loss: Likelihood) -> None:
    network, mean, variance = _network(), _random(1, *SHAPE), _random(1, *SHAPE, seed=1)
    target = _target(loss, 1)
    weight = network[1].weight
    assert isinstance(weight, Tensor)

    def gradient(loss_of: Tensor) -> Tensor:
        return torch.autograd.grad(loss_of, [weight])[0]

    oracle = gradient(exact(network, mean, variance, target, loss).loss.sum())
    correction = oracle - gradient(mean_only(network, mean, None, target, loss).loss.sum())
    errors = {}
    for rows in (64, 4096):
        means, variances, targets = _repeat(rows, mean, variance, target)
        found = gradient(gauss_newton(network, means, variances, targets, loss, _draws(rows)).loss.mean())
        errors[rows] = float((found - oracle).norm() / correction.norm())
    assert errors[4096] < 0.1
    assert errors[4096] < 0.5 * errors[64]


@pytest.mark.parametrize("estimate", [gauss_newton, sampled, antithetic])
def test_more_samples_are_the_mean_of_single_ones(estimate: Callable[..., GroupLoss]) -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    target, loss, draws = _random(2, K, seed=2), SquaredError(), _draws()
    together = estimate(network, mean, variance, target, loss, draws, samples=3).loss
    again = _draws()
    single = [estimate(network, mean, variance, target, loss, again).loss for _ in range(3)]
    torch.testing.assert_close(together, torch.stack(single).mean(0), rtol=1e-12, atol=0)
    assert single[0][0] != single[1][0]


def test_parameter_gradient_of_the_estimate_matches_finite_differences() -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    label = _random(2, K, seed=8)

    class FixedSquaredError(SquaredError):
        """A squared error with a constant label, as it is within one step."""

        def pseudo_label(self, outputs: Tensor, noise: Tensor) -> Tensor:
            return label

    def total() -> Tensor:
        return gauss_newton(network, mean, variance, label + 1, FixedSquaredError(), _draws()).loss.sum()

    weight = network[1].weight
    assert isinstance(weight, Tensor)
    (gradient,) = torch.autograd.grad(total(), [weight])
    for index in ((0, 0), (4, 5), (2, 3)):
        with torch.no_grad():
            weight[index] += 1e-5
        above = float(total().detach())
        with torch.no_grad():
            weight[index] -= 2e-5
        below = float(total().detach())
        with torch.no_grad():
            weight[index] += 1e-5
        assert float(gradient[index]) == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_monte_carlo_over_members_confirms_the_second_order() -> None:
    """Members drawn from a narrow product density: the mean of their losses exceeds L(x̄) by the full-Hessian term."""
    network, loss, width = _network(), CrossEntropy(), 0.2
    mean, variance = _random(1, *SHAPE), torch.full((1, *SHAPE), width**2 / 3, dtype=torch.float64)
    noise = (2 * _random(100_000, *SHAPE, seed=11) - 1) * width
    target = torch.tensor([1])
    with torch.no_grad():
        # Antithetic members: the first-order noise would hide the second order.
        values = 0.5 * sum(loss.value(network(mean + s * noise), target.expand(len(noise))) for s in (1, -1))
        assert isinstance(values, Tensor)
        excess = values - loss.value(network(mean), target)

    def value(pixels: Tensor) -> Tensor:
        return loss.value(network(pixels[None]), target)[0]

    curvature = torch.diagonal(jacrev(jacrev(value))(mean[0]).reshape(D, D)).detach()
    oracle = 0.5 * float((variance.flatten() * curvature).sum())
    error = 4.5 * float(excess.std()) / math.sqrt(len(noise))
    assert abs(float(excess.mean()) - oracle) < error + 0.05 * abs(oracle)
    assert error < 0.2 * abs(oracle)
    means, variances, targets = _repeat(4096, mean, variance, target)
    pairs = antithetic(network, means, variances, targets, loss, _draws(4096)).loss.detach()
    found = pairs - loss.value(network(mean), target).detach()
    assert abs(float(found.mean()) - oracle) < 4.5 * float(found.std()) / math.sqrt(4096) + 0.05 * abs(oracle)


def _repeat(rows: int, *tensors: Tensor) -> list[Tensor]:
    return [tensor.expand(rows, *tensor.shape[1:]) for tensor in tensors]
