"""The merged loss against oracles obtained another way, in float64.

Shapes: B groups, D pixel values, K outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from storage_schemas import ConfigError
from trainer import CrossEntropy, Loss, SquaredError, exact, gauss_newton, individual_loss, merged_loss
from trainer.curvature import Curvature

SHAPE = (1, 2, 3)
D, K = 6, 4


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=_generator(seed), dtype=torch.float64)


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
    """diag[Jᵀ H J] of each row by forward definition: Jacobians from torch.func, H as given."""

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


def _estimate(network: nn.Module, inputs: Tensor, loss: Loss, samples: int, seed: int = 0) -> Tensor:
    pixels = inputs.clone().requires_grad_()
    return gauss_newton(network(pixels), pixels, loss, generator=_generator(seed), samples=samples).detach()


def _exact(network: nn.Module, inputs: Tensor, loss: Loss) -> Tensor:
    pixels = inputs.clone().requires_grad_()
    return exact(network(pixels), pixels, loss).detach()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_linear_model_and_diagonal_covariance_give_the_group_loss_exactly(scale: float) -> None:
    network, centre = _linear(), _random(*SHAPE, seed=3)
    deviations = torch.diag(0.1 + _random(D, seed=4)).reshape(D, *SHAPE)
    members = torch.cat([centre + deviations, centre - deviations])
    target = _random(1, K, seed=5)
    # Eq. 1, written out.
    group = torch.stack([scale * ((network(x[None]) - target) ** 2).sum() for x in members]).mean()

    mean = members.mean(0, keepdim=True)
    variance = ((members - mean) ** 2).mean(0, keepdim=True)
    merged = merged_loss(network, mean, variance, target, SquaredError(scale), exact)

    assert merged.loss.shape == (1,)
    torch.testing.assert_close(merged.loss[0], group, rtol=0, atol=1e-10)
    assert merged.correction[0] > 1e-2


def test_correction_follows_the_scale_of_the_loss() -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    target = _random(2, K, seed=2)

    def correction(scale: float, curvature: Curvature) -> Tensor:
        return merged_loss(network, mean, variance, target, SquaredError(scale), curvature).correction.detach()

    torch.testing.assert_close(correction(1.0, exact), 2 * correction(0.5, exact), rtol=1e-10, atol=0)
    # The same noise is scaled in both, so the ratio is exact for the estimate too.
    one, half = (functools.partial(gauss_newton, generator=_generator()) for _ in range(2))
    torch.testing.assert_close(correction(1.0, one), 2 * correction(0.5, half), rtol=1e-10, atol=0)


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
def test_estimate_converges_at_the_monte_carlo_rate(loss: Loss) -> None:
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


def test_pseudo_labels_follow_the_density_of_the_loss() -> None:
    outputs = _random(1, K).expand(40_000, K)
    for scale in (1.0, 0.5):
        labels = SquaredError(scale).pseudo_label(outputs, _generator())
        torch.testing.assert_close(labels.mean(0), outputs[0], rtol=0, atol=0.03)
        torch.testing.assert_close(labels.var(0), torch.full_like(outputs[0], 1 / (2 * scale)), rtol=0.04, atol=0)
    classes = CrossEntropy().pseudo_label(outputs, _generator())
    shares = torch.bincount(classes, minlength=K) / len(classes)
    torch.testing.assert_close(shares.double(), outputs[0].softmax(0), rtol=0, atol=0.012)


def test_no_gradient_flows_through_the_draw() -> None:
    outputs = _random(2, K).requires_grad_()
    assert not SquaredError().pseudo_label(outputs, _generator()).requires_grad
    assert not CrossEntropy().pseudo_label(outputs, _generator()).requires_grad


@pytest.mark.parametrize("loss", [SquaredError(1.0), CrossEntropy()])
def test_parameter_gradients_match_the_dense_oracle(loss: Loss) -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    squared = isinstance(loss, SquaredError)
    target = _random(2, K, seed=2) if squared else torch.tensor([1, 3])
    parameters = list(network.parameters())
    merged = merged_loss(network, mean, variance, target, loss, exact)
    found = torch.autograd.grad(merged.loss.sum(), parameters)

    def hessian(outputs: Tensor) -> Tensor:
        return 2 * torch.eye(K, dtype=torch.float64) if squared else _softmax_hessian(outputs)

    outputs = network(mean)
    value = (
        (outputs - target).square().sum() if squared else functional.cross_entropy(outputs, target, reduction="sum")
    )
    oracle = value + 0.5 * (variance * _diagonal(network, mean, hessian)).sum()
    for mine, theirs in zip(found, torch.autograd.grad(oracle, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        assert theirs.abs().max() > 1e-4


def test_parameter_gradient_of_the_estimate_matches_finite_differences() -> None:
    network, mean, variance = _network(), _random(2, *SHAPE), _random(2, *SHAPE, seed=1)
    label = _random(2, K, seed=8)

    class FixedSquaredError(SquaredError):
        """The label as a constant, as it is within one step."""

        def pseudo_label(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
            return label

    def total() -> Tensor:
        estimate = functools.partial(gauss_newton, generator=_generator())
        return merged_loss(network, mean, variance, label + 1, FixedSquaredError(), estimate).loss.sum()

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


@pytest.mark.parametrize("loss", [SquaredError(1.0), CrossEntropy()])
def test_rows_of_a_batch_do_not_mix(loss: Loss) -> None:
    network, inputs = _network(), _random(3, *SHAPE)
    variance, other = _random(3, *SHAPE, seed=1), inputs.clone()
    other[0] = 0.9
    target = _random(3, K, seed=2) if isinstance(loss, SquaredError) else torch.tensor([0, 1, 2])
    results = [
        merged_loss(network, x, variance, target, loss, functools.partial(gauss_newton, generator=_generator()))
        for x in (inputs, other)
    ]
    assert results[0].loss[0] != results[1].loss[0]
    # The labels of the other rows come from the same draws, whatever row 0 holds.
    torch.testing.assert_close(results[0].loss[1:], results[1].loss[1:], rtol=0, atol=1e-12)


def test_mean_only_has_no_correction() -> None:
    network, mean, target = _network(), _random(2, *SHAPE), _random(2, K, seed=1)
    merged = merged_loss(network, mean, torch.ones_like(mean), target, SquaredError(), None)
    assert not merged.correction.any()
    torch.testing.assert_close(merged.loss, (network(mean) - target).square().sum(1))


def test_individual_loss_averages_within_groups_of_any_size() -> None:
    network, counts = _network().float(), [3, 1, 2]
    members = torch.randint(0, 256, (6, *SHAPE), generator=_generator(), dtype=torch.uint8)
    target = _random(3, K, seed=1).float()
    found = individual_loss(network, members, counts, target, SquaredError())
    groups = [members[:3], members[3:4], members[4:]]
    oracle = [((network(group / 255) - y) ** 2).sum(1).mean() for group, y in zip(groups, target, strict=True)]
    torch.testing.assert_close(found.loss, torch.stack(oracle))


class _Attention(nn.Module):
    """One attention layer, through the fused kernel or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.projection = nn.Linear(8, 24, bias=False)
        self.projection.weight.data = _random(24, 8, seed=9).float() - 0.5

    def forward(self, pixels: Tensor) -> Tensor:
        query, key, value = self.projection(pixels.reshape(len(pixels), 1, 4, 8)).chunk(3, dim=-1)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = (query @ key.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ value
        return mixed.flatten(1)


def test_attention_has_a_double_backward() -> None:
    pixels, variance = _random(2, 1, 4, 8).float(), _random(2, 1, 4, 8, seed=1).float()
    gradients = []
    for fused in (True, False):
        model = _Attention(fused)
        estimate = functools.partial(gauss_newton, generator=_generator())
        loss = merged_loss(model, pixels, variance, torch.zeros(2, 32), SquaredError(), estimate)
        loss.correction.sum().backward()
        assert model.projection.weight.grad is not None
        gradients.append(model.projection.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().max()) > 1e-3


def test_transformer_layer_trains() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), layer, nn.Flatten())
    pixels = _random(2, 4, 2, 4).float()
    estimate = functools.partial(gauss_newton, generator=_generator())
    merged_loss(model, pixels, pixels, torch.zeros(2, 32), SquaredError(), estimate).loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_exact_refuses_large_models() -> None:
    pixels = torch.zeros(1, 3, 224, 224, requires_grad=True)
    outputs = torch.zeros(1, 512)
    with pytest.raises(ConfigError, match=r"curvature.*512 outputs.*gauss_newton"):
        exact(outputs, pixels, SquaredError())
