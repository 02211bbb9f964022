"""Training on a GPU: the CPU's losses and gradients, one wait a step, and runs that are resumed."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from datamerge.attacks import arithmetic
from datamerge.encoders import load_encoder
from storage_schemas import Record, open_artifact
from tests.support.small_models import open_clip, timm
from trainer import Draws, Stopped, TrainConfig, train
from trainer.data.batches import Batch, Read, moments
from trainer.data.order import WHOLE
from trainer.data.stream import Collate, stream
from trainer.estimators import gauss_newton
from trainer.losses import SquaredError
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import Processes
from trainer.run.forward import Forward, seeded_layers
from trainer.run.job import Job, make_job
from trainer.run.loop import run_job
from trainer.run.refine import Refinement, refine
from trainer.run.update import Optimisation

MakeArtifact = Callable[..., str]
Waits = Callable[[Callable[[], object]], list[str]]
ATTACK = {"epsilon": "8/255", "step_size": "1/255", "steps": 10}
ARMS: dict[str, dict[str, Any]] = {
    "gauss_newton": {},
    "sampled": {"estimator": "sampled"},
    "antithetic": {"estimator": "antithetic"},
    "factors": {"arm": "factors"},
    "factors, gauss_newton": {"arm": "factors", "estimator": "gauss_newton"},
    "ind": {"arm": "ind"},
    "mean-only": {"arm": "mean-only"},
    "random-member": {"arm": "random-member"},
    "refined": {"arm": "random-member", "refine_steps": 2},
}


def _job(make_artifact: MakeArtifact, run: Path, device: torch.device, **settings: Any) -> Job:
    name = run.name
    artifact = make_artifact(name=f"artifact-{name}", seed=7, clean=True, attack=ATTACK, spread=4, factors=1)
    defaults = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1, "device": str(device)}
    return make_job(TrainConfig(artifact=artifact, run=str(run), **{**defaults, **settings}))


def _first_step(job: Job) -> tuple[float, Tensor]:
    """Loss, and all gradients as one vector on the CPU."""
    training = Optimisation(job, Processes())
    with arithmetic(job.device, tf32=job.config.precision != "float32"):
        outcome = training.step(0, job.feed(WHOLE, 0, 1), lambda: 0)
    gradients = [p.grad.flatten() for p in training.parameters if p.grad is not None]
    return outcome.values["loss"], torch.cat(gradients).cpu()


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("arm", ARMS)
def test_arms_agree_with_the_cpu(
    make_artifact: MakeArtifact, tmp_path: Path, device: torch.device, arm: str, precision: str
) -> None:
    expected = _first_step(_job(make_artifact, tmp_path / "cpu", torch.device("cpu"), **ARMS[arm]))
    loss, gradient = _first_step(_job(make_artifact, tmp_path / "gpu", device, precision=precision, **ARMS[arm]))
    rounding, least = {"float32": (1e-5, 0.99999), "tf32": (5e-3, 0.999), "bfloat16": (5e-2, 0.98)}[precision]
    assert loss == pytest.approx(expected[0], rel=rounding)
    assert torch.cosine_similarity(gradient, expected[1], dim=0) > least


@pytest.mark.parametrize("arm", ARMS)
def test_a_step_waits_once(
    make_artifact: MakeArtifact, tmp_path: Path, device: torch.device, waits: Waits, arm: str
) -> None:
    job = _job(make_artifact, tmp_path / "run", device, **ARMS[arm])
    training, batches = Optimisation(job, Processes()), list(job.feed(WHOLE, 0, 3))
    training.step(0, iter(batches), lambda: 0)
    found = waits(lambda: training.step(1, iter(batches[1:]), lambda: 0))
    assert len(found) <= 1, found


def test_a_resumed_run_equals_an_uninterrupted_one(
    make_artifact: MakeArtifact, tmp_path: Path, device: torch.device
) -> None:
    artifact = make_artifact()
    for name in ("whole", "stopped"):
        shared: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 1e-2, "device": str(device)}
        config = TrainConfig(artifact=artifact, run=str(tmp_path / name), **shared)
        if name == "stopped":
            job = make_job(config)
            with pytest.raises(Stopped):
                run_job(_stopping(job, 3), RunFolder(config.run), Processes())
            job = make_job(config)
            state = RunFolder(config.run).load(RunFolder(config.run).checkpoints()[-1], job.identity)
            training = Optimisation(job, Processes())
            training.restore(state["optimizer"])
            for one in training.optimizer.state.values():
                # Where AdamW is not fused it would wait for a step on the device.
                assert one["step"].is_cpu == (device.type == "cpu")
                assert one["exp_avg"].device.type == device.type
        train(config)
    one, other = (load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def _stopping(job: Job, after: int) -> Job:
    """The same job, which gets a SIGTERM in step number `after`."""

    def feed(*arguments: Any) -> Iterator[Batch]:
        for number, batch in enumerate(job.feed(*arguments)):
            if number == after - 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    return replace(job, feed=feed)


def test_batches_are_page_locked(make_artifact: MakeArtifact, tmp_path: Path, device: torch.device) -> None:
    _assert_page_locked(make_artifact, tmp_path, device, workers=0)


@pytest.mark.usefixtures("several_processes")
def test_batches_of_data_workers_are_page_locked(
    make_artifact: MakeArtifact, tmp_path: Path, device: torch.device
) -> None:
    _assert_page_locked(make_artifact, tmp_path, device, workers=2)


def _assert_page_locked(make_artifact: MakeArtifact, tmp_path: Path, device: torch.device, workers: int) -> None:
    job = _job(make_artifact, tmp_path / "run", device, arm="factors", data_workers=workers)
    sent = stream(
        open_artifact(job.config.artifact),  # type: ignore[arg-type]
        job.order,
        Collate("factors", labels=False, members=0),
        start=0,
        stop=3,
        workers=workers,
        pin=device.type == "cuda",
    )
    for batch, given in zip(sent, job.feed(WHOLE, 0, 3), strict=True):
        assert batch.tensors()
        assert all(tensor.is_pinned() for tensor in batch.tensors()) == (device.type == "cuda")
        assert given.keys == batch.keys
        for tensor, other in zip(given.tensors(), batch.tensors(), strict=True):
            assert tensor.device.type == device.type
            assert torch.equal(tensor.cpu(), other)


@pytest.mark.parametrize("count", [2, 10, 17, 200])
def test_integers_become_the_same_floats_as_on_the_cpu(device: torch.device, count: int) -> None:
    """All sums of `count` members, and all scatters, to the last bit."""
    total = np.resize(np.arange(255 * count + 1, dtype=np.uint16), (1, 1, 255 * count + 1))
    scatter = np.resize(np.arange(2**16, dtype=np.uint16), total.shape)
    record = Record("a", count, "uint8_moments", {"sum": total, "scatter": scatter})
    sent = moments(Read([record], {"keys": ["a"], "target": torch.zeros(1)}, {}))
    made = sent.to(device).floats()
    assert np.array_equal(made.mean[0].cpu(), record.mean)
    assert np.array_equal(made.variance[0].cpu(), record.variance)


def test_fused_adamw_equals_the_plain_one(device: torch.device) -> None:
    generator, found = torch.Generator().manual_seed(0), []
    gradients = torch.randn(20, 1000, generator=generator).to(device)
    for fused in (True, None):
        weights = torch.nn.Parameter(torch.linspace(-1, 1, 1000, device=device))
        optimizer = torch.optim.AdamW([weights], lr=1e-3, fused=fused)
        for gradient in gradients:
            weights.grad = gradient.clone()
            optimizer.step()
        found.append(weights.detach())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_compiled_curvature_equals_eager(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if device.type == "cpu":
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend="aot_eager"))
    encoder, found = attention(device).eval(), []
    mean, variance = torch.rand(8, 3, 16, 16, device=device), torch.full((8, 3, 16, 16), 1e-5, device=device)
    target = torch.zeros(8, 16, device=device)
    for compiled in (False, True):
        model = Forward(encoder, compiled=compiled)
        losses = gauss_newton(model, mean, variance, target, SquaredError(), Draws(list(range(8))))
        gradients = torch.autograd.grad(losses.loss.sum(), list(encoder.parameters()))
        found.append((losses.loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    assert torch.cosine_similarity(found[1][1], found[0][1], dim=0) > 0.9999


class Attention(nn.Module):
    """Patches of 4 × 4 pixels, one block of attention, the mean of the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.norm, self.qkv, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 16)
        self.drop = nn.Dropout(0.2)

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.patches(pixels).flatten(2).transpose(1, 2)
        query, key, value = self.qkv(self.norm(tokens)).unflatten(2, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        found: Tensor = self.out(nn.functional.gelu(self.drop(tokens + mixed))).mean(dim=1)
        return found


def _timm() -> nn.Module:
    network: nn.Module = timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=16
    )
    return network


def _open_clip() -> nn.Module:
    network: nn.Module = open_clip.transformer.VisionTransformer(
        image_size=16, patch_size=4, width=32, layers=1, heads=2, mlp_ratio=4.0, output_dim=16
    )
    return network


def attention(device: torch.device, make: Callable[[], nn.Module] = Attention) -> Any:
    encoder = load_encoder("mlp:3x16x16-8-16")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder.model = make()
    return encoder.to(device).train()


@pytest.mark.parametrize("make", [Attention, _timm, _open_clip])
def test_curvature_in_bfloat16_agrees_with_float32(device: torch.device, make: Callable[[], nn.Module]) -> None:
    """The double backward runs, and its correction equals float32's up to rounding."""
    encoder = attention(device, make).eval()
    torch.manual_seed(1)
    mean, variance = torch.rand(8, 3, 16, 16).to(device), torch.full((8, 3, 16, 16), 1e-5, device=device)
    target, found = torch.zeros(8, 16, device=device), {}
    for precision in ("float32", "bfloat16"):
        model = Forward(encoder, precision=cast(Any, precision))
        with arithmetic(device, tf32=precision != "float32"):
            losses = gauss_newton(model, mean, variance, target, SquaredError(), Draws(list(range(8))))
            gradients = torch.autograd.grad(losses.loss.sum(), list(encoder.parameters()))
        assert losses.correction is not None
        assert (losses.correction >= 0).all()
        found[precision] = losses.loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])
    torch.testing.assert_close(found["bfloat16"][0], found["float32"][0], rtol=5e-2, atol=1e-4)
    assert torch.cosine_similarity(found["bfloat16"][1], found["float32"][1], dim=0) > 0.97


def test_compiled_networks_equal_eager_ones(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients, dropout included, for batches of 8, 8 and 5 images; and refined pixels."""
    if device.type == "cpu":
        original = torch.compile
        monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend="eager"))
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    graphs.clear()
    encoder = attention(device)
    models = Forward(encoder), Forward(encoder, compiled=True)
    for count in (8, 8, 5):
        pixels, found = torch.rand(count, 3, 16, 16, device=device), []
        for model in models:
            with seeded_layers(count, device):
                outputs = model(pixels)
            gradients = torch.autograd.grad(outputs.square().sum(), list(encoder.parameters()))
            found.append(torch.cat([outputs.detach().flatten(), *(gradient.flatten() for gradient in gradients)]))
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert 1 <= graphs["unique_graphs"] <= 2  # one for a fixed batch size, and one for any
    encoder.eval()
    points, target = torch.rand(8, 3, 16, 16, device=device), torch.zeros(8, 16, device=device)
    one, other = (
        refine(model, points, points, target, SquaredError(), Refinement(2, 1 / 255, 4 / 255)) for model in models
    )
    # Where the gradient is almost 0, its sign may differ.
    assert ((one - other).abs() > 1e-6).float().mean() < 0.01


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_steps_are_reproducible_to_the_last_bit(device: torch.device, precision: str) -> None:
    encoder = attention(device)
    torch.manual_seed(1)
    pixels, found = torch.rand(64, 3, 16, 16).to(device), []
    for _ in range(2):
        with arithmetic(device, tf32=precision != "float32"), seeded_layers(0, device):
            outputs = Forward(encoder, precision=cast(Any, precision))(pixels)
            gradients = torch.autograd.grad(outputs.square().sum(), list(encoder.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert torch.equal(*found)
