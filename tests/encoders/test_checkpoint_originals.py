"""Weight files of timm, of its networks' authors, of big_vision and of MobileCLIP, which the libraries convert."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder
from datamerge.encoders.checkpoints import load_into, read_checkpoint
from datamerge.encoders.specs import parse_spec
from storage_schemas import ConfigError
from tests.support.refusals import refused
from tests.support.small_clips import NAME, add_models, scrambled, small_clip

MODELS: dict[str, dict[str, Any]] = {
    NAME: {},
    "small-siglip": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"}
    },
    "small-trunk": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"}
    },
    "small-mobile": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None}
    },
}


@pytest.fixture(scope="module", autouse=True)
def _models(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_models(tmp_path_factory.mktemp("configs"), MODELS)


def _pixels(side: int) -> Tensor:
    return torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))


def _embed(encoder: Encoder, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.model(pixels)  # type: ignore[no-any-return]


def _timm(name: str, seed: int = 1, **options: Any) -> Any:
    import timm

    return scrambled(timm.create_model(name, **{"num_classes": 5, **options}), seed)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_weights_of_timm(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier as timm's training saves it, with averaged weights; the encoder drops the last layer."""
    network = _timm(name)
    saved = {
        "epoch": 3,
        "arch": name,
        "state_dict": {f"module.{key}": torch.zeros_like(tensor) for key, tensor in network.state_dict().items()},
        "state_dict_ema": network.state_dict(),
        "metric": np.float64(71.5),
    }
    torch.save(saved, tmp_path / "w.pth.tar")
    encoder = load_encoder(f"timm:{name}@{tmp_path / 'w.pth.tar'}")
    assert "`state_dict_ema`" in capsys.readouterr().err
    pixels = _pixels(160)
    with torch.no_grad():
        expected = network.forward_head(network.forward_features(pixels), pre_logits=True)
    torch.testing.assert_close(_embed(encoder, pixels), expected, atol=1e-5, rtol=1e-5)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    assert load_encoder(f"timm:{name}@{tmp_path / 'w.pth'}").sha256 == encoder.sha256
    assert capsys.readouterr().err == ""


def _facebook_convnext(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm with the names of facebookresearch/ConvNeXt."""
    result = {}
    for name, tensor in state.items():
        renamed = re.sub(r"^stem\.", "downsample_layers.0.", name)
        renamed = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", renamed)
        renamed = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", renamed)
        renamed = renamed.replace("conv_dw", "dwconv").replace("mlp.fc", "pwconv")
        renamed = renamed.replace("head.norm", "norm").replace("head.fc", "head")
        linear = "pwconv" in renamed and tensor.ndim == 4
        result[renamed] = tensor.flatten(1) if linear else tensor
    return result


def _original_dinov2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm, without classifier, with the names of facebookresearch/dinov2 with registers."""
    result = {"register_tokens": state["reg_token"], "mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    # The original adds positions to the class token; in timm they are part of it.
    result["pos_embed"] = torch.cat([torch.full_like(state["cls_token"], 0.25), state["pos_embed"]], dim=1)
    result["cls_token"] = state["cls_token"] - 0.25
    return result | {name: one for name, one in state.items() if name not in (*result, "reg_token")}


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
@pytest.mark.parametrize("wrapper", [None, "model", "teacher"])
def test_original_files_are_converted_by_the_filters_of_timm(
    tmp_path: Path, prefix: str, wrapper: str | None
) -> None:
    import timm

    convnext = _timm("test_convnext")
    dinov2 = _timm("test_vit", num_classes=0, reg_tokens=2, no_embed_class=True)
    for network, original in (
        (convnext, _facebook_convnext(convnext.state_dict())),
        (dinov2, _original_dinov2(dinov2.state_dict())),
    ):
        named = {f"{prefix}{name}": tensor for name, tensor in original.items()}
        torch.save({wrapper: named} if wrapper else named, tmp_path / "w.pth")
        empty = deepcopy(network)
        scrambled(empty, 9)
        empty.reset_classifier(0)
        load_into(empty, read_checkpoint(tmp_path / "w.pth"), parse_spec("timm:test_vit"))
        for name, tensor in empty.state_dict().items():
            torch.testing.assert_close(tensor, network.state_dict()[name], atol=1e-6, rtol=0)
    assert timm.is_model("test_vit")


def test_another_grid_is_resampled_as_timm_does(tmp_path: Path) -> None:
    import timm

    network = _timm("test_vit", num_classes=0)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    larger = timm.create_model("test_vit", num_classes=0, img_size=192)
    messages = load_into(larger, read_checkpoint(tmp_path / "w.safetensors"), parse_spec("timm:test_vit"))
    assert len(messages) == 1
    assert "10x10 to 12x12 patches" in messages[0]
    network.set_input_size((192, 192))
    with torch.no_grad():
        torch.testing.assert_close(larger.eval()(_pixels(192)), network(_pixels(192)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["small-siglip", "small-trunk"])
def test_towers_of_timm_in_open_clip(tmp_path: Path, name: str) -> None:
    """Files of the whole CLIP, of its tower, and, if the tower has no projection, of timm's network."""
    clip = small_clip(name)
    states = [clip.state_dict(), clip.visual.state_dict()]
    if name == "small-siglip":
        states.append(clip.visual.trunk.state_dict())
    for state in states:
        torch.save({f"module.{key}": tensor for key, tensor in state.items()}, tmp_path / "w.pt")
        encoder = load_encoder(f"open_clip:{name}@{tmp_path / 'w.pt'}")
        with torch.no_grad():
            assert torch.equal(_embed(encoder, _pixels(160)), clip.visual(_pixels(160)))


def _big_vision(trunk: Any) -> dict[str, Any]:
    """A SigLIP's image tower with the names of Google's big_vision: the inverse of open_clip's converter."""
    state = {name: tensor.numpy() for name, tensor in trunk.state_dict().items()}
    heads, width = trunk.blocks[0].attn.num_heads, trunk.embed_dim
    result: dict[str, Any] = {"embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0)}
    result |= {"embedding/bias": state["patch_embed.proj.bias"], "pos_embedding": state["pos_embed"]}
    result |= {"MAPHead_0/probe": state["attn_pool.latent"], "cls": state["cls_token"]}

    def norm(name: str, source: str) -> None:
        result.update({f"{name}/scale": state[f"{source}.weight"], f"{name}/bias": state[f"{source}.bias"]})

    def dense(name: str, weight: Any, bias: Any, shape: tuple[int, ...], bias_shape: tuple[int, ...] = (-1,)) -> None:
        result.update({f"{name}/kernel": weight.T.reshape(shape), f"{name}/bias": bias.reshape(bias_shape)})

    def attention(name: str, weights: list[Any], biases: list[Any], source: str) -> None:
        for part, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            dense(f"{name}/{part}", weight, bias, (width, heads, -1), (heads, -1))
        dense(f"{name}/out", state[f"{source}.proj.weight"], state[f"{source}.proj.bias"], (heads, -1, width))

    def mlp(name: str, source: str) -> None:
        for index in (0, 1):
            fc = f"{source}.fc{index + 1}"
            dense(f"{name}/Dense_{index}", state[f"{fc}.weight"], state[f"{fc}.bias"], state[f"{fc}.weight"].T.shape)

    for index in range(len(trunk.blocks)):
        block, source = f"Transformer/encoderblock_{index}", f"blocks.{index}"
        qkv = [np.split(state[f"{source}.attn.qkv.{kind}"], 3) for kind in ("weight", "bias")]
        norm(f"{block}/LayerNorm_0", f"{source}.norm1")
        norm(f"{block}/LayerNorm_1", f"{source}.norm2")
        attention(f"{block}/MultiHeadDotProductAttention_0", qkv[0], qkv[1], f"{source}.attn")
        mlp(f"{block}/MlpBlock_0", f"{source}.mlp")
    pool = {
        kind: [state[f"attn_pool.q.{kind}"], *np.split(state[f"attn_pool.kv.{kind}"], 2)]
        for kind in ("weight", "bias")
    }
    attention("MAPHead_0/MultiHeadDotProductAttention_0", pool["weight"], pool["bias"], "attn_pool")
    norm("MAPHead_0/LayerNorm_0", "attn_pool.norm")
    mlp("MAPHead_0/MlpBlock_0", "attn_pool.mlp")
    norm("Transformer/encoder_norm", "norm")
    return {f"params/img/{name}": value for name, value in result.items()}


def test_archives_of_big_vision(tmp_path: Path) -> None:
    """SigLIP's .npz is read; files of another depth, without an array, or for another tower are refused."""
    clip = small_clip("small-siglip")
    arrays, file = _big_vision(clip.visual.trunk), tmp_path / "siglip.npz"
    np.savez(file, **arrays)
    encoder = load_encoder(f"open_clip:small-siglip@{file}")
    with torch.no_grad():
        assert torch.equal(_embed(encoder, _pixels(160)), clip.visual(_pixels(160)))
    blocks = len(clip.visual.trunk.blocks)
    deeper: dict[str, Any] = {f"params/img/Transformer/encoderblock_{blocks}/LayerNorm_0/scale": np.zeros(64)}
    # Layers of the text tower do not count.
    text: dict[str, Any] = {"params/txt/Encoder_0/encoderblock_30/LayerNorm_0/scale": np.zeros(64)}
    np.savez(file, **arrays, **text)
    load_encoder(f"open_clip:small-siglip@{file}")
    np.savez(file, **arrays, **deeper)
    with refused(ConfigError, "encoder", "small-siglip", file, f"{blocks + 1} layers for {blocks}"):
        load_encoder(f"open_clip:small-siglip@{file}")
    arrays.pop("params/img/MAPHead_0/probe")
    np.savez(file, **arrays)
    with refused(ConfigError, "encoder", "small-siglip", file, "MAPHead_0/probe"):
        load_encoder(f"open_clip:small-siglip@{file}")
    with refused(ConfigError, "encoder", f"open_clip:{NAME}", file, "timm"):
        load_encoder(f"open_clip:{NAME}@{file}")


def _apple(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of timm's FastViT with the names of apple/ml-mobileclip, with one sequence of all stages."""
    stages = sorted({int(name.split(".")[1]) for name in state if name.startswith("stages.")})
    places: dict[str, int] = {}
    for stage in stages:
        for part in ("downsample.proj", "pos_emb.pos_enc", "blocks"):
            if any(name.startswith(f"stages.{stage}.{part}.") for name in state):
                places[f"stages.{stage}.{part}"] = len(places)
    result = {}
    for name, tensor in state.items():
        for source, index in places.items():
            suffix = {"downsample.proj": ".proj", "pos_emb.pos_enc": ".pe", "blocks": ""}[source.split(".", 2)[2]]
            name = re.sub(rf"^{re.escape(source)}(?=\.)", f"network.{index}{suffix}", name)
        for theirs, ours in (("patch_embed", "stem"), ("rbr_conv", "conv_kxk"), ("rbr_scale", "conv_scale")):
            name = name.replace(ours, theirs)
        for theirs, ours in (("rbr_skip", "identity"), ("conv_exp", "final_conv"), ("lkb_origin", "large_conv")):
            name = name.replace(ours, theirs)
        name = name.replace("se.fc1", "se.reduce").replace("se.fc2", "se.expand").replace("mlp.", "convffn.")
        name = re.sub(r"layer_scale(_\d)?\.gamma", r"layer_scale\1", name)
        if name != "head.fc.bias":
            named = {"head.fc.weight": "head.proj"}.get(name, name)
            result[f"image_encoder.model.{named}"] = tensor.T if name == "head.fc.weight" else tensor
    return result


@pytest.mark.parametrize("prefix", ["", "module."])
def test_original_files_of_mobileclip(tmp_path: Path, prefix: str) -> None:
    clip = small_clip("small-mobile")
    with torch.no_grad():
        # The original has a projection without a bias.
        clip.visual.trunk.head.fc.bias.zero_()
    state = {**_apple(clip.visual.trunk.state_dict()), "logit_scale": torch.ones(())}
    torch.save({f"{prefix}{name}": tensor for name, tensor in state.items()}, tmp_path / "mobileclip.pt")
    encoder = load_encoder(f"open_clip:small-mobile@{tmp_path / 'mobileclip.pt'}")
    with torch.no_grad():
        expected = clip.visual(_pixels(64))
    torch.testing.assert_close(_embed(encoder, _pixels(64)), expected, atol=1e-5, rtol=1e-5)
