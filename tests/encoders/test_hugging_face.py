"""Vision models of transformers by their specs: pixels and embeddings equal those of its processors and models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from datamerge.encoders import load_encoder, save_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from tests.support.photos import PHOTOS, Exploit, embedded
from tests.support.refusals import refused
from tests.support.small_models import shaken

make_torchvision_importable()

import transformers  # noqa: E402 - it imports torchvision

VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
DINO = {name: value for name, value in VISION.items() if name != "intermediate_size"}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
SQUASHED = {"size": {"height": 32, "width": 32}}
INTERPOLATED = {"interpolate_pos_encoding": True}


def _clip() -> Any:
    # The widths of the projection differ; the whole model's counts.
    vision = {**VISION, "projection_dim": 40}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=24))


def _clip_config() -> Any:
    return transformers.CLIPVisionConfig(**VISION, projection_dim=24)


def _siglip() -> Any:
    return transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))


def _vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**VISION))


# Name → model, image processor, its settings, transformers' embedding of normalised pixels.
Kind = tuple[Callable[[], Any], str, dict[str, Any], Callable[..., Any]]
KINDS: dict[str, Kind] = {
    "CLIPModel": (
        _clip,
        "CLIPImageProcessor",
        CROPPED,
        lambda model, pixels, **more: model.get_image_features(pixels, **more).pooler_output,
    ),
    "CLIPVisionModelWithProjection": (
        lambda: transformers.CLIPVisionModelWithProjection(_clip_config()),
        "CLIPImageProcessor",
        CROPPED,
        lambda model, pixels, **more: model(pixels, **more).image_embeds,
    ),
    "CLIPVisionModel": (
        lambda: transformers.CLIPVisionModel(_clip_config()),
        "CLIPImageProcessor",
        {**CROPPED, "image_mean": [0.1, 0.2, 0.3], "resample": 2},
        lambda model, pixels, **more: model(pixels, **more).pooler_output,
    ),
    "SiglipModel": (
        _siglip,
        "SiglipImageProcessor",
        SQUASHED,
        lambda model, pixels, **more: model.get_image_features(pixels, **more).pooler_output,
    ),
    "SiglipVisionModel": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION)),
        "SiglipImageProcessor",
        {**SQUASHED, "rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        lambda model, pixels, **more: model(pixels, **more).pooler_output,
    ),
    "Dinov2Model": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINO)),
        "BitImageProcessor",
        {**CROPPED, "do_normalize": False},
        lambda model, pixels, **_: model(pixels).pooler_output,
    ),
    "Dinov2WithRegistersModel": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINO)),
        "BitImageProcessor",
        CROPPED,
        lambda model, pixels, **_: model(pixels).pooler_output,
    ),
    "ViTForImageClassification": (
        _vit,
        "ViTImageProcessor",
        SQUASHED,
        lambda model, pixels, **more: model.vit(pixels, **more).last_hidden_state[:, 0],
    ),
}


def save_model(folder: Path, kind: str) -> Any:
    """Write the folder of a random model as transformers does; returns the model."""
    create, processor, settings, _ = KINDS[kind]
    model: Any = shaken(create())
    model.save_pretrained(folder)
    getattr(transformers, processor)(**settings).save_pretrained(folder)
    return model


def by_transformers(model: Any, kind: str, size: int | None = None) -> Tensor:
    """Embeddings of the photos by transformers' processor and model, of length 1."""
    _, name, settings, embed = KINDS[kind]
    scaled: dict[str, Any] = {}
    if size is not None:
        scaled = {"size": {"height": size, "width": size}}
        if "crop_size" in settings:
            scaled = {"size": {"shortest_edge": size * 36 // 32}, "crop_size": {"height": size, "width": size}}
    processor = getattr(transformers, f"{name}Pil")(**settings | scaled)
    with torch.no_grad():
        pixels = processor(PHOTOS, return_tensors="pt")["pixel_values"]
        return nn.functional.normalize(embed(model, pixels, **(INTERPOLATED if size else {})), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_equal_transformers(tmp_path: Path, kind: str) -> None:
    """From the folder, and from a file that was saved from it."""
    model = save_model(tmp_path / "m", kind)
    encoder = load_encoder(f"hf:{tmp_path / 'm'}")
    assert (embedded(encoder) - by_transformers(model, kind)).abs().max() < 1e-6
    assert not encoder.random_weights
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    reloaded = load_encoder(f"hf:{tmp_path / 'm'}@{tmp_path / 'encoder.safetensors'}")
    assert (reloaded.sha256, reloaded.preprocessing) == (encoder.sha256, encoder.preprocessing)
    assert torch.equal(embedded(reloaded), embedded(encoder))


@pytest.mark.parametrize("kind", KINDS)
def test_another_size_resamples_positions_as_transformers_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    model = save_model(tmp_path / "m", kind)
    capsys.readouterr()
    encoder = load_encoder(f"hf:{tmp_path / 'm'},image_size=48")
    (line,) = capsys.readouterr().err.splitlines()
    assert all(fact in line for fact in (str(tmp_path / "m"), "48x48", "32x32", "transformers"))
    assert (embedded(encoder) - by_transformers(model, kind, 48)).abs().max() < 1e-6
    save_encoder(encoder, tmp_path / "e.safetensors")
    for size in ("", ",image_size=48"):
        reloaded = load_encoder(f"hf:{tmp_path / 'm'}{size}@{tmp_path / 'e.safetensors'}")
        assert reloaded.preprocessing == encoder.preprocessing
        assert torch.equal(embedded(reloaded), embedded(encoder))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_the_kind_of_clip_vision_model_is_recognised_by_the_weights(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path / "m", kind)
    config = tmp_path / "m" / "config.json"
    document = json.loads(config.read_text())
    del document["architectures"]
    config.write_text(json.dumps(document))
    encoder = load_encoder(f"hf:{tmp_path / 'm'}")
    assert (embedded(encoder) - by_transformers(model, kind)).abs().max() < 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith(("CLIP", "Siglip"))])
def test_the_file_in_a_folder_may_be_named_too(tmp_path: Path, kind: str) -> None:
    save_model(tmp_path / "m", kind)
    encoder = load_encoder(f"hf:{tmp_path / 'm'}")
    assert load_encoder(f"hf:{tmp_path / 'm'}@{tmp_path / 'm' / 'model.safetensors'}").sha256 == encoder.sha256


def test_half_precision_weights_become_single(tmp_path: Path) -> None:
    save_model(tmp_path / "m", "CLIPModel").half().save_pretrained(tmp_path / "m")
    assert {value.dtype for value in load_encoder(f"hf:{tmp_path / 'm'}").parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel", "Dinov2Model"])
def test_attention_has_a_double_backward(tmp_path: Path, kind: str) -> None:
    """The estimator gauss_newton needs it, with this kernel."""
    save_model(tmp_path / "m", kind)
    encoder = load_encoder(f"hf:{tmp_path / 'm'}")
    pixels = torch.rand((2, *encoder.input_shape), generator=torch.Generator().manual_seed(0)).requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(encoder(pixels).square().sum(), pixels, create_graph=True)
        gradient.square().sum().backward()
    assert all(
        value.grad is not None and value.grad.isfinite().all()
        for name, value in encoder.named_parameters()
        if "mask_token" not in name and "bias" not in name and "position" not in name
    )


@pytest.mark.parametrize("revision", ["", "@v2"])
def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """Without a network, they are read from the Hub's cache."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = tmp_path / "cache" / "models--org--name"
    expected = save_model(model / "snapshots" / commit, "CLIPModel")
    (model / "refs").mkdir()
    (model / "refs" / (revision.removeprefix("@") or "main")).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    encoder = load_encoder(f"hf:org/name{revision}")
    assert (embedded(encoder) - by_transformers(expected, "CLIPModel")).abs().max() < 1e-6
    assert encoder.spec == f"hf:org/name{revision}"
    save_encoder(encoder, tmp_path / "e.safetensors")
    reloaded = load_encoder(f"hf:org/name{revision}@{tmp_path / 'e.safetensors'}")
    assert torch.equal(embedded(reloaded), embedded(encoder))
    for missing in ("hf:org/other", "hf:org/name@v9"):
        with refused(ConfigError, "encoder", f"'{missing}'", "hf:FOLDER"):
            load_encoder(missing)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(tmp_path / "m", "CLIPModel")
    return tmp_path / "m"


def _edit(path: Path, **changes: Any) -> None:
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def test_folders_without_a_usable_configuration_are_refused(folder: Path) -> None:
    with refused(ConfigError, "encoder", "config.json", f"{folder}/nowhere"):
        load_encoder(f"hf:{folder}/nowhere")
    config = folder / "config.json"
    config.write_text("{")
    with refused(ConfigError, "encoder", f"'hf:{folder}'"):
        load_encoder(f"hf:{folder}")
    config.write_text('{"model_type": "bert"}')
    with refused(ConfigError, "encoder", f"'hf:{folder}'", "'bert'", "siglip"):
        load_encoder(f"hf:{folder}")
    config.unlink()
    with refused(ConfigError, "encoder", "config.json", folder):
        load_encoder(f"hf:{folder}")


@pytest.mark.parametrize("whole", [True, False])
def test_a_siglip_without_its_pooling_head_has_no_embedding(tmp_path: Path, whole: bool) -> None:
    """Vision-language models keep their vision tower so."""
    headless = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)
    if whole:
        transformers.SiglipConfig(text_config=TEXT, vision_config=headless.to_dict()).save_pretrained(tmp_path)
    else:
        headless.save_pretrained(tmp_path)
    with refused(ConfigError, "encoder", f"'hf:{tmp_path}'", "pooling head"):
        load_encoder(f"hf:{tmp_path}")


def test_a_folder_has_no_revision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    with refused(ConfigError, "encoder", "@main", folder.name):
        load_encoder(f"hf:{folder.name}@main")


def test_damaged_and_incomplete_weights_are_refused(folder: Path) -> None:
    spec, file = f"hf:{folder}", folder / "model.safetensors"
    data, state = file.read_bytes(), load_file(file)
    file.write_bytes(data[:-50])
    with refused(ConfigError, "encoder", f"'{spec}'", "truncated", "copy it again"):
        load_encoder(spec)
    lost = "vision_model.encoder.layers.1.mlp.fc1.weight"
    save_file({name: value for name, value in state.items() if name != lost}, file, {"format": "pt"})
    with refused(ConfigError, "encoder", f"'{spec}'", lost, "(1 ", ", 0 "):
        load_encoder(spec)
    save_file({**state, lost: torch.zeros(3, 32)}, file, {"format": "pt"})
    with refused(ConfigError, "encoder", f"'{spec}'", lost):
        load_encoder(spec)
    file.unlink()
    with refused(ConfigError, "encoder", f"'{spec}'"):
        load_encoder(spec)
    torch.save({"a": Exploit(folder / "executed")}, folder / "pytorch_model.bin")
    with refused(ConfigError, "encoder", f"'{spec}'", "plain tensors"):
        load_encoder(spec)
    assert not (folder / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor"),
        ({"image_processor_type": "ConvNextImageProcessor", "size": {"shortest_edge": 32}}, "ConvNextImageProcessor"),
        ({"do_center_crop": False}, "'shortest_edge': 36"),
        ({"size": {"longest_edge": 36, "shortest_edge": 32}}, "longest_edge"),
        ({"do_resize": False}, "CLIPImageProcessor"),
    ],
)
def test_unsupported_processors_are_refused(folder: Path, changes: dict[str, Any], fact: str) -> None:
    _edit(folder / "preprocessor_config.json", **changes)
    with refused(ConfigError, "encoder", f"'hf:{folder}'", "image processor", fact):
        load_encoder(f"hf:{folder}")


def test_a_folder_without_a_processor_is_refused(folder: Path) -> None:
    (folder / "preprocessor_config.json").unlink()
    with refused(ConfigError, "encoder", "preprocessor_config.json", folder):
        load_encoder(f"hf:{folder}")


def test_missing_transformers_are_reported_with_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused(ConfigError, "encoder", f"'hf:{folder}'", "pip install 'datamerge[hf]'"):
        load_encoder(f"hf:{folder}")


def test_code_in_a_repository_is_not_run(folder: Path) -> None:
    (folder / "model.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    _edit(folder / "config.json", model_type="robust", auto_map={"AutoConfig": "model.Config"})
    with refused(ConfigError, "encoder", f"'hf:{folder}'"):
        load_encoder(f"hf:{folder}")
    assert not (folder / "executed").exists()
