"""Weights with other libraries' names, of other grids or networks: the libraries' embeddings, or a refusal."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamerge.encoders import Encoder, clip_names, load_encoder, save_encoder
from datamerge.encoders.checkpoints import load_into, read_checkpoint
from datamerge.encoders.specs import parse_spec
from storage_schemas import ConfigError
from tests.support.refusals import refused
from tests.support.small_clips import EMBEDDING, NAME, TOWER, add_models, scrambled, small_clip

SPEC, QUICK = f"open_clip:{NAME}", f"{NAME}-quickgelu"
MODELS: dict[str, dict[str, Any]] = {
    NAME: {},
    QUICK: {"quick_gelu": True},
    "small-48": {"vision_cfg": {"image_size": 48}},
    "small-wide": {"vision_cfg": {"width": 192}},
    "small-deep": {"vision_cfg": {"layers": 3}},
    "small-scale": {"vision_cfg": {"ls_init_value": 0.1}},
}


@pytest.fixture(scope="module", autouse=True)
def clip(tmp_path_factory: pytest.TempPathFactory) -> Any:
    add_models(tmp_path_factory.mktemp("configs"), MODELS)
    return small_clip()


def _pixels(side: int = 32) -> Tensor:
    return torch.randn((2, 3, side, side), generator=torch.Generator().manual_seed(0))


def _embed(encoder: Encoder, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return encoder.model(pixels)  # type: ignore[no-any-return]


def _vision_config(**changes: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2, "num_hidden_layers": 2}
    return {**sizes, "image_size": 32, "patch_size": 8, "projection_dim": EMBEDDING, "hidden_act": "gelu", **changes}


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection", "sharded", "bin", "LLaVA"])
def test_hugging_face_weights_in_open_clip(tmp_path: Path, kind: str) -> None:
    """q, k and v are joined and the projection is transposed."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

    if kind == "CLIPModel":
        text = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        config = CLIPConfig(vision_config=_vision_config(), text_config=text, projection_dim=EMBEDDING)
        assert isinstance(config.text_config, CLIPTextConfig)
        model: Any = scrambled(CLIPModel(config))
    else:
        model = scrambled(CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision_config())))
    file = tmp_path / "model.safetensors"
    if kind == "bin":
        torch.save(model.state_dict(), file := tmp_path / "pytorch_model.bin")
    elif kind == "LLaVA":
        state = {f"vision_tower.vision_tower.{name}": tensor for name, tensor in model.state_dict().items()}
        torch.save(state, file)
    else:
        model.save_pretrained(tmp_path, max_shard_size="500KB" if kind == "sharded" else "1GB")
    if kind == "sharded":
        file = next(tmp_path.glob("*.index.json"))
    encoder = load_encoder(f"{SPEC}@{file}").double()
    pixels = _pixels().double()
    with torch.no_grad():
        expected = model.double().visual_projection(model.vision_model(pixels).pooler_output)
    torch.testing.assert_close(_embed(encoder, pixels), expected, atol=1e-6, rtol=1e-6)


def test_names_are_converted_to_hugging_face_and_back(tmp_path: Path, clip: Any) -> None:
    """Exported weights are read back bit by bit."""
    state = clip.visual.state_dict()
    theirs = clip_names.to_hf(state)
    back = clip_names.from_hf(theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())
    save_file({name: tensor.contiguous() for name, tensor in theirs.items()}, tmp_path / "model.safetensors")
    encoder = load_encoder(f"{SPEC}@{tmp_path / 'model.safetensors'}")
    with torch.no_grad():
        assert torch.equal(_embed(encoder, _pixels()), clip.visual(_pixels()))


def test_two_towers_of_hugging_face_in_one_file_are_refused(tmp_path: Path, clip: Any) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    towers = [CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision_config())) for _ in range(2)]
    state = {
        f"{name}.{key}": tensor
        for name, tower in zip(("tuned", "original"), towers, strict=True)
        for key, tensor in tower.state_dict().items()
    }
    torch.save(state, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", tmp_path / "w.pt", "`tuned.`", "`original.`"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("requested", [NAME, QUICK])
def test_the_activation_of_hugging_face_weights_is_recognised(
    tmp_path: Path, activation: str, requested: str
) -> None:
    """It is read from the configuration beside the weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model = scrambled(CLIPVisionModelWithProjection(CLIPVisionConfig(**_vision_config(hidden_act=activation))))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(f"open_clip:{requested}@{tmp_path / 'model.safetensors'}")
    assert parse_spec(encoder.spec).model == (QUICK if activation == "quick_gelu" else NAME)
    with torch.no_grad():
        expected = model(_pixels()).image_embeds
    torch.testing.assert_close(_embed(encoder, _pixels()), expected, atol=1e-5, rtol=1e-5)


def test_hugging_face_weights_without_a_projection_are_refused(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    CLIPVisionModel(CLIPVisionConfig(**_vision_config())).save_pretrained(tmp_path)
    with refused(ConfigError, "encoder", SPEC, "Hugging Face", "'proj' (1 of "):
        load_encoder(f"{SPEC}@{tmp_path / 'model.safetensors'}")


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("source", ["open_clip", "own", "whole", "memory"])
def test_weights_in_networks_of_hugging_face(
    tmp_path: Path, clip: Any, projected: bool, wrapped: bool, source: str
) -> None:
    """Weights of open_clip, of the tower as saved and as in memory, and of the whole CLIP."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    kind: Any = CLIPVisionModelWithProjection if projected else CLIPVisionModel
    config = CLIPVisionConfig(**_vision_config())
    network, theirs = kind(config).eval(), scrambled(kind(config))
    file = tmp_path / "model.safetensors"
    if source == "open_clip":
        save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, file)
    elif source == "own":
        theirs.save_pretrained(tmp_path)
    elif source == "memory":
        torch.save(theirs.state_dict(), file)
    else:
        vision = "" if projected else "vision_model."
        state = {f"{vision}{name}": tensor for name, tensor in theirs.state_dict().items()}
        text = {"text_model.embeddings.position_embedding.weight": torch.ones(3, 3), "logit_scale": torch.ones(())}
        torch.save({**state, **text, "visual_projection.weight": torch.ones(EMBEDDING, 128), **state}, file)
    model = nn.ModuleDict({"network": network}) if wrapped else network
    load_into(model, read_checkpoint(file), parse_spec(f"hf:{tmp_path}"))
    pixels = _pixels().double()
    with torch.no_grad():
        output = network.double()(pixels)
        if source == "open_clip":
            visual = deepcopy(clip.visual).double()
            found = output.image_embeds if projected else output.pooler_output @ visual.proj
            torch.testing.assert_close(found, visual(pixels), atol=1e-6, rtol=1e-6)
        else:
            assert torch.equal(output[0], theirs.double()(pixels)[0])


TOWERS = {
    "CLIPVisionModelWithProjection": ("CLIPVisionConfig", "CLIPImageProcessor"),
    "CLIPVisionModel": ("CLIPVisionConfig", "CLIPImageProcessor"),
    "SiglipVisionModel": ("SiglipVisionConfig", "SiglipImageProcessor"),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersConfig", "BitImageProcessor"),
    "ViTModel": ("ViTConfig", "ViTImageProcessor"),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_files_for_hugging_face_specs(tmp_path: Path, kind: str) -> None:
    """Weights as saved, as in memory (other names since transformers 5), below a prefix, and from `save_encoder`."""
    import transformers

    config, processor = (getattr(transformers, name) for name in TOWERS[kind])
    model = scrambled(getattr(transformers, kind)(config(**_vision_config())))
    model.save_pretrained(tmp_path)
    squash = kind in ("SiglipVisionModel", "ViTModel")
    size: dict[str, Any] = {"size": {"height": 32, "width": 32}}
    processor(**(size if squash else {"size": {"shortest_edge": 32}, "crop_size": 32})).save_pretrained(tmp_path)
    theirs = load_encoder(f"hf:{tmp_path}")
    saved = load_file(tmp_path / "model.safetensors")
    save_encoder(theirs, tmp_path / "own.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "memory.pt")
    torch.save({f"module.model.{name}": tensor for name, tensor in saved.items()}, tmp_path / "prefix.pt")
    for file in ("model.safetensors", "own.safetensors", "memory.pt", "prefix.pt"):
        assert load_encoder(f"hf:{tmp_path}@{tmp_path / file}").sha256 == theirs.sha256, file


def test_another_grid_is_resampled_as_open_clip_does(
    tmp_path: Path, clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    torch.save(clip.state_dict(), tmp_path / "w.pt")
    theirs = open_clip.create_model("small-48", pretrained=str(tmp_path / "w.pt")).visual.eval()
    torch.save(
        {"state_dict": {f"_orig_mod.{name}": one for name, one in clip.visual.state_dict().items()}}, tmp_path / "v"
    )
    for file in ("w.pt", "v"):
        encoder = load_encoder(f"open_clip:small-48@{tmp_path / file}")
        with torch.no_grad():
            assert torch.equal(_embed(encoder, _pixels(48)), theirs(_pixels(48)))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("encoder: ")]
        assert len(lines) == 1
        assert "4x4 to 6x6" in lines[0]
        # The class token has no place in the grid.
        assert torch.equal(
            encoder.model.get_parameter("positional_embedding")[0], clip.visual.positional_embedding[0]
        )


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_another_grid_is_resampled_as_hugging_face_does(tmp_path: Path, kind: str) -> None:
    """The larger network's output equals that of the smaller one with `interpolate_pos_encoding`."""
    import transformers

    make: Any = {
        "clip": lambda **sizes: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**_vision_config(**sizes))
        ),
        "siglip": lambda **sizes: transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**_vision_config(**sizes))
        ),
        "dinov2": lambda **sizes: transformers.Dinov2Model(
            transformers.Dinov2Config(**_vision_config(**sizes), mlp_ratio=2)
        ),
    }[kind]
    theirs, network = scrambled(make()), make(image_size=48).eval()
    theirs.save_pretrained(tmp_path)
    messages = load_into(network, read_checkpoint(tmp_path / "model.safetensors"), parse_spec(f"hf:{tmp_path}"))
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        expected = theirs(_pixels(48), **options).pooler_output
        torch.testing.assert_close(network(_pixels(48)).pooler_output, expected, atol=1e-6, rtol=1e-6)
    assert len(messages) == 1
    assert "4x4 to 6x6 patches" in messages[0]


@pytest.mark.parametrize("name", ["small-wide", "small-deep"])
def test_weights_of_another_shape_are_refused_with_the_models_they_fit(tmp_path: Path, name: str) -> None:
    """The error also has the closest readings, with counts and shapes."""
    torch.save({f"module.{key}": tensor for key, tensor in small_clip(name).state_dict().items()}, tmp_path / "w.pt")
    facts = {
        "small-wide": ["below `module.visual.`", "'class_embedding' (0 of 32", "[192] for [128]"],
        "small-deep": ["12 tensors", "'transformer.resblocks.2."],
    }[name]
    with refused(ConfigError, "encoder", SPEC, tmp_path / "w.pt", *facts) as caught:
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")
    assert name in str(caught.value)


def test_weights_of_other_architectures_are_refused(tmp_path: Path, clip: Any) -> None:
    import timm

    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pt")
    with refused(ConfigError, "encoder", SPEC, tmp_path / "w.pt", "closest: ", "of 32 tensors missing"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    with refused(ConfigError, "encoder", "timm:test_resnet", tmp_path / "w.pt", "closest: "):
        load_encoder(f"timm:test_resnet@{tmp_path / 'w.pt'}")
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", "32 of 32 tensors missing"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")


def test_tensors_of_missing_layers_are_refused_and_others_reported(
    tmp_path: Path, clip: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    scaled = small_clip("small-scale").visual.state_dict()
    torch.save(scaled, tmp_path / "w.pt")
    with refused(ConfigError, "encoder", SPEC, "4 tensors", "'transformer.resblocks.0.ls_1.gamma'"):
        load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")
    torch.save(
        {**clip.visual.state_dict(), "probe.weight": torch.zeros(3), "probe.bias": torch.zeros(3)}, tmp_path / "w.pt"
    )
    load_encoder(f"{SPEC}@{tmp_path / 'w.pt'}")
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert " 2 tensors" in line
    assert "'probe.weight'" in line
    assert TOWER["layers"] == 2
