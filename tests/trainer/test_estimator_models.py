"""Requirements of estimators on models and moments: separate rows, full precision, a double backward."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from storage_schemas import ConfigError
from tests.support.refusals import refused
from trainer import (
    CrossEntropy,
    Draws,
    GroupLoss,
    Loss,
    SquaredError,
    antithetic,
    gauss_newton,
    mean_only,
    sampled,
)

SHAPE = (1, 2, 3)
D, K = 6, 4


def _draws(groups: int = 2) -> Draws:
    return Draws(range(groups))


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _network() -> nn.Sequential:
    network = nn.Sequential(nn.Flatten(), nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, K)).double()
    for index, parameter in enumerate(network.parameters()):
        parameter.data = _random(*parameter.shape, seed=index) - 0.5
    return network


def _target(loss: Loss, groups: int = 2) -> Tensor:
    return _random(groups, K, seed=2) if isinstance(loss, SquaredError) else torch.arange(groups) % K


ESTIMATES: dict[str, Callable[..., GroupLoss]] = {
    "mean_only": mean_only,
    "gauss_newton": gauss_newton,
    "sampled": sampled,
    "antithetic": antithetic,
}


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("loss", [SquaredError(1.0), CrossEntropy()])
def test_rows_of_a_batch_do_not_mix(loss: Loss, name: str) -> None:
    network, inputs = _network(), _random(3, *SHAPE)
    variance, other, target = _random(3, *SHAPE, seed=1), inputs.clone(), _target(loss, 3)
    other[0] = 0.9
    results = [ESTIMATES[name](network, x, variance, target, loss, _draws(3)) for x in (inputs, other)]
    assert results[0].loss[0] != results[1].loss[0]
    torch.testing.assert_close(results[0].loss[1:], results[1].loss[1:], rtol=0, atol=1e-12)
    # A group alone has the same loss as in a batch.
    alone = ESTIMATES[name](network, inputs[1:2], variance[1:2], target[1:2], loss, Draws([1]))
    torch.testing.assert_close(alone.loss[0], results[0].loss[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["gauss_newton", "sampled", "antithetic"])
def test_batch_norm_in_training_mode_is_refused(name: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(D, K), nn.BatchNorm1d(K)).double()
    arguments = (_random(2, *SHAPE), _random(2, *SHAPE, seed=1), _random(2, K), SquaredError(), _draws())
    with refused(ConfigError, None, "2: ", "BatchNorm", "eval"):
        ESTIMATES[name](network, *arguments)
    ESTIMATES[name](network.eval(), *arguments)


@pytest.mark.parametrize("name", ["gauss_newton", "sampled", "antithetic"])
def test_half_precision_moments_are_refused(name: str) -> None:
    mean, variance = _random(2, *SHAPE).float(), _random(2, *SHAPE, seed=1).bfloat16()
    with refused(ConfigError, "variance", "float32", "float64", "bfloat16"):
        ESTIMATES[name](_network().float(), mean, variance, _random(2, K), SquaredError(), _draws())


@pytest.mark.parametrize("name", ["gauss_newton", "sampled", "antithetic"])
def test_under_autocast_losses_and_corrections_stay_float32(name: str) -> None:
    network, mean = _network().float(), _random(2, *SHAPE).float()
    variance, target = _random(2, *SHAPE, seed=1).float(), _random(2, K).float()

    def model(pixels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            outputs: Tensor = network(pixels)
        assert outputs.dtype == torch.bfloat16
        return outputs

    found = ESTIMATES[name](model, mean, variance, target, SquaredError(), _draws())
    oracle = ESTIMATES[name](network, mean, variance, target, SquaredError(), _draws())
    assert found.loss.dtype == torch.float32
    torch.testing.assert_close(found.loss, oracle.loss, rtol=0.05, atol=0)
    if found.correction is not None:
        assert found.correction.dtype == torch.float32
        torch.testing.assert_close(found.correction, oracle.correction, rtol=0.05, atol=0)
    found.loss.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in network.parameters())


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
        correction = gauss_newton(model, pixels, variance, torch.zeros(2, 32), SquaredError(), _draws()).correction
        assert correction is not None
        correction.sum().backward()
        assert model.projection.weight.grad is not None
        gradients.append(model.projection.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert float(gradients[0].abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["gauss_newton", "sampled", "antithetic"])
def test_transformer_layer_trains(name: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Flatten(2), layer, nn.Flatten())
    pixels = _random(2, 4, 2, 4).float()
    ESTIMATES[name](model, pixels, pixels, torch.zeros(2, 32), SquaredError(), _draws()).loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
