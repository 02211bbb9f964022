"""The curvature estimator in one compiled graph: the same losses, and the same gradients but for rounding."""

from __future__ import annotations

import pytest
import torch

from datamerge.encoders import Encoder
from tests.gpu.test_train import attention
from trainer.data.noise import Draws
from trainer.estimators import gauss_newton
from trainer.losses import CrossEntropy, Likelihood, SquaredError
from trainer.run.forward import Forward


@pytest.mark.parametrize(("loss", "samples"), [(SquaredError(), 2), (SquaredError(0.5), 1), (CrossEntropy(), 2)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_one_compiled_graph_gives_the_losses_and_gradients_of_two_passes(
    monkeypatch: pytest.MonkeyPatch, loss: Likelihood, samples: int, precision: str
) -> None:
    """The network has attention and is traced as a whole; no code is generated. bfloat16 rounds at other places."""
    original = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: original(function, backend="aot_eager", fullgraph=True)
    )
    encoder: Encoder = attention(torch.device("cpu")).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        mean, variance = torch.rand(3, 3, 16, 16), 1e-3 * torch.rand(3, 3, 16, 16)
    target = torch.arange(3) if isinstance(loss, CrossEntropy) else torch.zeros(3, 16)
    found = []
    for compiled in (False, True):
        model = Forward(encoder, precision=precision, compiled=compiled)  # type: ignore[arg-type]
        losses = gauss_newton(model, mean, variance, target, loss, Draws(range(3)), samples=samples)
        gradients = torch.autograd.grad(losses.loss.sum(), list(encoder.parameters()))
        found.append((losses.loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    (one, ours), (other, theirs) = found
    if precision == "float32":
        assert torch.equal(one, other)
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6 * float(ours.abs().max()))
    else:
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)
        assert torch.cosine_similarity(ours, theirs, dim=0) > 0.9995
