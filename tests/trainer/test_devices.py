"""Measures for GPUs, tested on the CPU: copies, synchronisation, deterministic kernels, compilation and rounding."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func

from datamerge.encoders import Encoder, load_encoder
from datamerge.runtime.compilers import prepare_compilation
from storage_schemas import ConfigError
from tests.support.operations import Operations
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.data.batches import repeated
from trainer.data.noise import Draws
from trainer.estimators import individual_loss
from trainer.losses import CrossEntropy, SquaredError
from trainer.run.checkpoint import RunFolder
from trainer.run.forward import Forward, seeded_layers
from trainer.run.refine import Refinement, refine

MakeArtifact = Callable[..., str]


@pytest.mark.parametrize("kind", ["signs", "normal", "exponential"])
@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 7, 3)])
def test_draws_are_not_converted_by_the_copy_itself(kind: str, shape: tuple[int, ...]) -> None:
    """A copy that changes device and type at once would convert on the CPU first, even to a larger type."""
    like = torch.empty(shape, device="meta")
    with Operations() as seen:
        drawn = getattr(Draws([1, 2, 3]), kind)(like)
    assert (drawn.shape, drawn.dtype, drawn.device.type) == (like.shape, torch.float32, "meta")
    assert "to another device" in seen.names
    assert not seen.conversions_in_copies


def test_signs_are_the_bits_of_the_streams() -> None:
    """Bits are unpacked highest first, as NumPy does it."""
    drawn = Draws([7, 8]).signs(torch.empty(2, 3, 7, 3, dtype=torch.float64))
    for row, seed in zip(drawn, (7, 8), strict=True):
        packed = np.frombuffer(np.random.default_rng(seed).bytes(8), np.uint8)
        bits = np.unpackbits(packed, count=63).astype(np.float64)
        np.testing.assert_array_equal(row.flatten().numpy(), 2 * bits - 1)


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 4, 4], [1, 3, 2]], ids=str)
def test_repeating_rows_does_not_wait_for_the_device(counts: list[int]) -> None:
    for values in (torch.arange(3), torch.randn(3, 2, 5)):
        with Operations() as seen:
            found = repeated(values, counts)
        assert torch.equal(found, values.repeat_interleave(torch.tensor(counts), dim=0))
        sizes = [name for name in seen.names if "repeat_interleave" in name or "_local_scalar_dense" in name]
        assert len(sizes) == (len(set(counts)) > 1)  # reads the counts, which are on the CPU
        assert found.dtype == values.dtype


@pytest.mark.parametrize("counts", [[1, 1, 1], [4, 4, 4], [1, 3, 2]], ids=str)
def test_the_mean_over_members_equals_that_of_each_group_bit_for_bit(counts: list[int]) -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(sum(counts), 6), torch.tensor([0, 5, 2])
    losses = CrossEntropy().value(outputs, labels.repeat_interleave(torch.tensor(counts)))
    expected = torch.stack([group.mean() for group in losses.split(counts)])
    found = individual_loss(nn.Identity(), outputs, counts, labels, CrossEntropy()).loss
    assert torch.equal(found, expected)


def test_checkpoints_are_read_onto_the_cpu(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW keeps its step counters on the device they are loaded to, and waits for those on a GPU."""
    places: list[Any] = []
    original = torch.load

    def load(*arguments: Any, **options: Any) -> Any:
        places.append(options.get("map_location"))
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "load", load)
    config = TrainConfig(
        artifact=make_artifact(), run=str(tmp_path / "run"), steps=4, batch_size=4, checkpoint_every=2
    )
    train(config)
    (tmp_path / "run" / "run.json").unlink()
    train(config)
    assert places == ["cpu"]
    assert RunFolder(config.run).summary() is not None


def test_a_network_without_deterministic_kernels_is_trained_with_others(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch's error on a GPU comes in the second of two micro-batches: the step is repeated, the run is the same."""
    artifact, weights = make_artifact(), []
    calls: list[int] = []

    @contextmanager
    def broken(device: torch.device) -> Iterator[None]:
        yield
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("max_pool2d_backward does not have a deterministic implementation, but you set …")

    for name in ("whole", "broken"):
        if name == "broken":
            monkeypatch.setattr("trainer.run.update.fixed_order", broken)
        train(TrainConfig(artifact=artifact, run=str(tmp_path / name), steps=3, batch_size=4, accumulate=2))
        weights.append(load_file(tmp_path / name / "encoder.safetensors"))
    assert len(calls) == 2
    assert capsys.readouterr().err.count("without a deterministic kernel (max_pool2d_backward") == 1
    assert all(torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())


class Layers(nn.Module):
    """Three linear layers on flattened pixels, and dropout between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(16, 16), nn.Dropout(0.5)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 6)

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.second(self.drop(self.first(pixels.flatten(1)))).tanh()
        outputs: Tensor = self.last(hidden)
        return outputs


def _layers(encoder: nn.Module) -> Layers:
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder.model, Layers)
    return encoder.model


@pytest.fixture
def encoder() -> Encoder:
    made = load_encoder("mlp:1x4x4-8-6")
    torch.manual_seed(1)
    made.model = Layers()
    return made.eval()


def test_refinement_computes_no_gradients_of_weights_in_a_compiled_pass(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    products: list[str] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products.extend(str(node.target) for node in graph.graph.nodes if "mm" in str(node.target))
        return make_boxed_func(graph)

    original, backend = torch.compile, aot_autograd(fw_compiler=lambda *_: make_boxed_func(_[0]), bw_compiler=count)
    monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend=backend))
    model = Forward(encoder, compiled=True)
    points = torch.full((2, 1, 4, 4), 0.5)
    refine(model, points, points, torch.zeros(2, 6), SquaredError(), Refinement(2, 1 / 255, 8 / 255))
    assert len(products) == 3  # one for each layer: the gradient of its inputs
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow  # generates code, and calls the system's compiler
@pytest.mark.filterwarnings("default")
def test_compiled_dropout_draws_the_same(encoder: Encoder) -> None:
    pixels, outputs = torch.rand(4, 1, 4, 4), []
    for compiled in (False, True):
        run = Forward(encoder.train(), compiled=compiled)
        with seeded_layers(5, torch.device("cpu")):
            outputs.append(run(pixels))
    torch.testing.assert_close(*outputs)


def test_bfloat16_resolves_fractions_of_a_grey_level(encoder: Encoder) -> None:
    """Means of ten members lie between levels; above 0.5, bfloat16 has steps of half a level."""
    encoder.mean, encoder.std = torch.tensor(0.4).view(1, 1, 1), torch.tensor(0.25).view(1, 1, 1)
    pixels, nearby = torch.full((1, 1, 4, 4), 0.745), torch.full((1, 1, 4, 4), 0.745 + 0.2 / 255)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder(pixels), encoder(nearby))
    model = Forward(encoder, precision="bfloat16")
    with torch.no_grad():
        exact = encoder(nearby) - encoder(pixels)
        seen: list[Tensor] = []
        handle = _layers(encoder).first.register_forward_hook(lambda *found: seen.append(found[2]))
        outputs = model(pixels), model(nearby)
        handle.remove()
    # Nothing is lost before the first layer; later layers round as usual.
    expected = _layers(encoder).first.weight @ torch.full((16,), 0.2 / 255 / 0.25)
    torch.testing.assert_close(seen[1][0] - seen[0][0], expected, rtol=1e-3, atol=1e-5)
    assert not torch.equal(*outputs)
    assert exact.abs().max() > 0
    # Weights keep the names of the network, and an average of the encoder computes with its own weights.
    assert set(encoder.state_dict()) == set(Layers().state_dict(prefix="model."))
    other = torch.optim.swa_utils.AveragedModel(encoder).module
    with torch.no_grad():
        _layers(other).first.weight.zero_()
        assert not torch.equal(Forward(cast(Encoder, other), precision="bfloat16")(pixels), outputs[0])


@pytest.mark.parametrize(("named", "found"), [(None, "g++ or clang++"), ("no-such-compiler", "no-such-compiler")])
def test_compilation_without_a_compiler_is_refused_at_once(
    encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, named: str | None, found: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if named:
        monkeypatch.setenv("CXX", named)
    with refused(ConfigError, "compile", found, "drop `compile`"):
        Forward(encoder, compiled=True)


def test_compilation_for_a_gpu_needs_the_headers_of_python(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "sh")  # any program: only its presence is checked
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with refused(ConfigError, "compile", str(tmp_path / "Python.h"), "drop `compile`"):
        prepare_compilation("compile", "cuda")
    (tmp_path / "Python.h").touch()
    prepare_compilation("compile", "cuda")


def test_seeded_layers_restore_the_global_generator() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    with seeded_layers(9, torch.device("cpu")):
        inside = torch.rand(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(torch.rand(1, generator=torch.Generator().manual_seed(9)), inside)
