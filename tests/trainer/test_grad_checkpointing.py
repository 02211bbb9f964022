"""Recomputed activations: the same bits, fewer activations kept, and networks without support are refused."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import trainer.run.update
from datamerge.encoders import load_encoder
from datamerge.runtime import load_settings
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, DatamergeError
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.run.forward import train_mode
from trainer.run.objective import group_losses
from trainer.run.recompute import recompute_activations

MakeArtifact = Callable[..., str]
SHAPE, WIDTH = (3, 32, 32), 12
CPU = torch.device("cpu")
ATTACK = {"method": "pgd", "epsilon": "2/255"}
# Towers of open_clip: its own with dropped patches, one of timm, a ResNet, and one of timm without support.
TOWERS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "patch_dropout": 0.3},
    "tiny-trunk": {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "timm_drop_path": 0.3},
    "tiny-resnet": {"layers": [1, 1, 1, 1], "width": 8},
    "tiny-unable": {"timm_model_name": "crossvit_tiny_240", "timm_pool": "", "timm_proj": "linear"},
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    make_torchvision_importable()
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    for name, tower in TOWERS.items():
        size = 240 if name == "tiny-unable" else 32
        config = {"embed_dim": WIDTH, "text_cfg": text, "vision_cfg": {"image_size": size, **tower}}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(autouse=True)
def _factories(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the networks of this file importable by `python:` specs."""
    module = types.ModuleType("networks_to_checkpoint")
    for factory in (timm_vit, Own, Reentrant, Silent):
        module.__dict__[factory.__name__] = factory
    monkeypatch.setitem(sys.modules, module.__name__, module)


def timm_vit() -> nn.Module:
    """timm's own vision transformer."""
    import timm

    network: nn.Module = timm.create_model(
        "test_vit", img_size=32, num_classes=WIDTH, drop_rate=0.1, drop_path_rate=0.3
    )
    network.input_shape = SHAPE  # type: ignore[assignment]
    return network


class Silent(nn.Module):
    """A network that accepts the switch and ignores it."""

    input_shape = SHAPE

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 * 32 * 32, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.enabled = enable

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels.flatten(1))  # type: ignore[no-any-return]


class Own(Silent):
    """A network that recomputes its layers."""

    enabled, reentrant = False, False

    def forward(self, pixels: Tensor) -> Tensor:
        if not self.enabled:
            return super().forward(pixels)
        return checkpoint(self.layers, pixels.flatten(1), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Reentrant(Own):
    """A network with reentrant checkpoints, which do not support gradients of pixels."""

    reentrant = True


OPEN_CLIP, TRUNK, TIMM, HF = (
    "open_clip:tiny-vit",
    "open_clip:tiny-trunk",
    "python:networks_to_checkpoint:timm_vit",
    "hf:",
)
ABLE = [OPEN_CLIP, TRUNK, TIMM, HF]


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP vision model of transformers, with dropout."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    folder = tmp_path_factory.mktemp("hf")
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        attention_dropout=0.2,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


@pytest.fixture
def complete(hf_folder: Path) -> Callable[[str], str]:
    """A function that completes a spec of `ABLE`: that of transformers lacks its temporary folder."""
    return lambda spec: f"hf:{hf_folder}" if spec == HF else spec


def _assert_same_with_checkpoints(make_artifact: MakeArtifact, tmp_path: Path, encoder: str, **settings: Any) -> None:
    """Train without and with checkpoints: losses, gradient norms and weights are the same bits."""
    artifact = make_artifact(
        shape=SHAPE, width=WIDTH, encoder=encoder, factors=1, clean=True, attack=ATTACK, spread=2, members=True
    )
    shared: dict[str, Any] = {
        "batch_size": 4,
        "steps": 2,
        "learning_rate": 1e-3,
        "log_every": 1,
        "arm": "factors",
        "encoder": encoder,
    }
    shared |= settings
    for name, on in (("plain", False), ("again", True)):
        train(TrainConfig(artifact=artifact, run=str(tmp_path / name), grad_checkpointing=on, **shared))
    _assert_same(tmp_path / "plain", tmp_path / "again")


def _assert_same(one: Path, other: Path) -> None:
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name in ("step", "loss", "gradient_norm")}
            for line in (run / "log.jsonl").read_text().splitlines()
        ]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]
    weights = load_file(other / "encoder.safetensors")
    for name, tensor in load_file(one / "encoder.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


@pytest.mark.parametrize("spec", ABLE)
def test_networks_train_to_the_same_bits(
    make_artifact: MakeArtifact, tmp_path: Path, spec: str, complete: Callable[[str], str]
) -> None:
    _assert_same_with_checkpoints(make_artifact, tmp_path, complete(spec), refine_steps=1, accumulate=2)


@pytest.mark.parametrize(
    "settings",
    [
        {"arm": "avg", "estimator": "sampled", "accumulate": 3},
        {"arm": "avg", "estimator": "antithetic", "freeze": ["conv1*", "positional_embedding", "*resblocks.0.*"]},
        {"estimator": "gauss_newton", "ema": 0.9},
        {"estimator": "antithetic", "samples": 2, "precision": "bfloat16"},
        {"arm": "ind", "members": 2, "refine_steps": 2},
        {"arm": "random-member", "gradient_clip": 0.1},
        {"arm": "mean-only"},
    ],
    ids=str,
)
def test_arms_train_to_the_same_bits(make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any]) -> None:
    _assert_same_with_checkpoints(make_artifact, tmp_path, "open_clip:tiny-vit", **settings)


def test_a_compiled_network_trains_to_the_same_bits(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without code generation, which takes a compiler and a minute.
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: original(function, backend="aot_eager"))
    _assert_same_with_checkpoints(make_artifact, tmp_path, "python:networks_to_checkpoint:Own", compile=True)


def test_a_run_can_be_continued_with_checkpoints(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = make_artifact(shape=SHAPE, width=WIDTH, encoder=OPEN_CLIP, factors=1)
    config = TrainConfig(
        artifact=artifact,
        run=str(tmp_path / "whole"),
        arm="factors",
        steps=4,
        batch_size=4,
        learning_rate=1e-3,
        log_every=1,
        checkpoint_every=2,
    )
    train(config)
    stopped = config.model_copy(update={"run": str(tmp_path / "stopped")})
    calls: list[int] = []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return group_losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.run.update, "group_losses", failing)
        with pytest.raises(KeyboardInterrupt):
            train(stopped)
    train(stopped.model_copy(update={"grad_checkpointing": True}))
    _assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert not json.loads((tmp_path / "whole/run.json").read_text())["config"]["grad_checkpointing"]


@pytest.mark.parametrize(
    ("spec", "layer"),
    [
        (OPEN_CLIP, "model.transformer.resblocks.1"),
        (TRUNK, "model.trunk.blocks.1"),
        (TIMM, "model.blocks.1"),
        (HF, "model.vision_model.encoder.layers.1.mlp"),
    ],
)
def test_layers_run_twice_and_fewer_bytes_are_kept(spec: str, layer: str, complete: Callable[[str], str]) -> None:
    encoder = load_encoder(complete(spec))
    train_mode(encoder)
    calls: list[int] = []
    encoder.get_submodule(layer).register_forward_pre_hook(lambda *_: calls.append(1))

    def runs() -> int:
        """Number of passes through the layer in a step; the second one may stop before the end of the layer."""
        calls.clear()
        encoder(torch.rand(2, *SHAPE)).square().sum().backward()
        return len(calls)

    assert runs() == 1
    kept = recompute_activations(encoder, CPU)
    assert runs() == 2
    assert 0 < kept.after < 0.5 * kept.before


def test_kept_bytes_equal_a_count_by_hand() -> None:
    encoder = load_encoder("python:networks_to_checkpoint:Own")
    pixels, hidden = 4 * 3 * 32 * 32, 4 * 16
    # The first layer keeps the normalised pixels, GELU its input, the last layer GELU's output.
    assert recompute_activations(encoder, CPU) == (pixels + 2 * hidden, pixels)


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ("open_clip:tiny-resnet", ["activations of one image"]),
        ("open_clip:tiny-unable", ["activations of one image"]),
        ("timm:crossvit_tiny_240", ["not supported"]),
        ("mlp:3x32x32-16-12", ["no method"]),
        ("python:networks_to_checkpoint:Silent", ["activations of one image"]),
        ("python:networks_to_checkpoint:Reentrant", ["use_reentrant"]),
    ],
)
def test_networks_that_would_keep_everything_are_refused(
    spec: str, facts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    encoder = load_encoder(spec)
    train_mode(encoder)
    with refused(ConfigError, "grad_checkpointing", spec, "drop `grad_checkpointing`", *facts):
        recompute_activations(encoder, CPU)
    assert not caplog.records


def test_an_estimator_with_a_double_backward_is_refused() -> None:
    settings = {"artifact": "a", "run": "r", "steps": 5, "grad_checkpointing": True}
    with refused(ConfigError, "grad_checkpointing", "gauss_newton", "sampled", "antithetic"):
        load_settings(TrainConfig, None, {}, settings)
    for other in ({"estimator": "sampled"}, {"arm": "factors", "estimator": "gauss_newton"}, {"arm": "ind"}):
        assert load_settings(TrainConfig, None, {}, {**settings, **other}).grad_checkpointing


def test_out_of_memory_advises_checkpoints_only_if_they_are_off(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhausted(*arguments: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(trainer.run.update, "group_losses", exhausted)
    artifact = make_artifact(shape=SHAPE, width=WIDTH, encoder=OPEN_CLIP, factors=1)
    config = TrainConfig(artifact=artifact, run=str(tmp_path / "run"), arm="factors", steps=1)
    with refused(DatamergeError, "batch_size", "`grad_checkpointing=True`"):
        train(config)
    capsys.readouterr()
    with pytest.raises(DatamergeError) as caught:
        train(config.model_copy(update={"grad_checkpointing": True}))
    assert "grad_checkpointing" not in str(caught.value)
    assert "grad_checkpointing: " in capsys.readouterr().err
