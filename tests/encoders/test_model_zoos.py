"""Encoders and heads of timm and open_clip: real architectures, suggestions for unknown names, activations."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from datamerge.encoders import load_encoder, load_head, parse_spec, save_encoder
from datamerge.encoders.open_clip_models import known_open_clip
from storage_schemas import ConfigError
from tests.support.refusals import refused

TIMM = "timm:test_resnet"


def test_timm_round_trip(tmp_path: Path) -> None:
    """Random weights are deterministic, the normalisation is the network's, and a saved file is read back."""
    encoder = load_encoder(TIMM)
    assert encoder.random_weights
    assert encoder.sha256 == load_encoder(TIMM).sha256
    pixels = torch.rand((2, *encoder.input_shape), generator=torch.Generator().manual_seed(0))
    config = encoder.model.pretrained_cfg
    assert isinstance(config, dict)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    embeddings = encoder(pixels)
    assert embeddings.shape == (2, encoder.embedding_dim)
    torch.testing.assert_close(embeddings, encoder.model((pixels - mean) / std))
    with torch.no_grad():
        next(encoder.parameters()).mul_(1.5)
    save_encoder(encoder, tmp_path / "w.safetensors")
    tuned = load_encoder(f"{TIMM}@{tmp_path / 'w.safetensors'}")
    assert torch.equal(tuned(pixels), encoder(pixels))


def test_the_classifier_of_a_timm_network(tmp_path: Path) -> None:
    """Its random weights are deterministic; a checkpoint's classifier is read."""
    head = load_head(TIMM)
    assert torch.equal(head.weight, load_head(TIMM).weight)
    assert head.scale is None
    head.check_width(load_encoder(TIMM).embedding_dim)
    state = {f"fc.{name}": torch.full_like(getattr(head, name), 0.5) for name in ("weight", "bias")}
    torch.save(state, tmp_path / "w.pt")
    loaded = load_head(f"{TIMM}@{tmp_path / 'w.pt'}")
    assert torch.equal(loaded.weight, state["fc.weight"])
    assert loaded.bias is not None
    assert torch.equal(loaded.bias, state["fc.bias"])
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pt")
    with refused(ConfigError, "head", tmp_path / "w.pt", "fc.weight"):
        load_head(f"{TIMM}@{tmp_path / 'w.pt'}")


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        ("timm:test_resnett", ["timm", "'test_resnett'", " test_resnet,"]),
        ("timm:test_resnet/r999_in1k", ["timm test_resnet", "'r999_in1k'", "r160_in1k"]),
        ("open_clip:ViT-B-23", ["open_clip", "'ViT-B-23'", "ViT-B-32"]),
        ("open_clip:ViT-B-32/opnai", ["open_clip ViT-B-32", "'opnai'", "openai"]),
    ],
)
def test_unknown_models_and_tags_come_with_suggestions(spec: str, facts: list[str]) -> None:
    with refused(ConfigError, "encoder", *facts):
        load_encoder(spec)


def test_a_name_without_similar_ones_comes_with_the_number_of_models() -> None:
    with refused(ConfigError, "encoder", "timm", "'qqqqqqqq'") as caught:
        load_encoder("timm:qqqqqqqq")
    assert re.search(r" \d{3,} ", str(caught.value))


@pytest.mark.parametrize(
    ("spec", "unknown"), [("timm:test_resnett", "'test_resnett'"), ("timm:test_resnet/r999_in1k", "'r999_in1k'")]
)
def test_heads_of_unknown_networks_are_refused(spec: str, unknown: str) -> None:
    with refused(ConfigError, "head", "timm", unknown, "test_resnet"):
        load_head(spec)


def test_a_zero_shot_head_of_open_clip_fits_the_encoder(tmp_path: Path) -> None:
    """A small CLIP is registered, so that the test is fast."""
    from datamerge.runtime.torchvision_ops import make_torchvision_importable

    make_torchvision_importable()
    import open_clip

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    (tmp_path / "tiny-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    encoder = load_encoder("open_clip:tiny-test")
    assert (encoder.input_shape, encoder.embedding_dim, encoder.random_weights) == ((3, 32, 32), 24, True)
    assert encoder.sha256 == load_encoder("open_clip:tiny-test").sha256
    assert encoder.mean.flatten().tolist() == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    head = load_head("open_clip:tiny-test", ["cat", "dog", "ant"])
    assert head.names == ["cat", "dog", "ant"]
    assert head.weight.shape == (3, 24)
    assert head.scale is not None
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(3))
    assert torch.equal(head.weight, load_head("open_clip:tiny-test", ["cat", "dog", "ant"]).weight)
    with refused(ConfigError, "head", "'open_clip:tiny-test'", "class_names"):
        load_head("open_clip:tiny-test")


@pytest.mark.parametrize(
    ("spec", "model"),
    [
        ("open_clip:ViT-L-14/openai", "ViT-L-14-quickgelu"),
        ("open_clip:ViT-B-32-quickgelu/openai", "ViT-B-32-quickgelu"),
        ("open_clip:ViT-L-14/laion2b_s32b_b82k", "ViT-L-14"),
        ("open_clip:ViT-B-32", "ViT-B-32"),
    ],
)
def test_weights_get_the_activation_they_were_trained_with(spec: str, model: str) -> None:
    assert known_open_clip(parse_spec(spec)).model == model
