"""Models of open_clip by their specs: pixels and embeddings equal those of open_clip's pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from datamerge.encoders import load_encoder, parse_spec, save_encoder
from datamerge.encoders.open_clip_models import build
from datamerge.sources import decode
from storage_schemas import ConfigError
from tests.support.photos import PHOTOS, Exploit, embedded
from tests.support.refusals import refused
from tests.support.small_models import open_clip, shaken, shrink_open_clip, timm

factory: Any = open_clip.factory

# Models of every family, with various preprocessing and activations.
FAMILIES = [
    "ViT-B-32/openai",
    "ViT-B-32/laion2b_s34b_b79k",
    "ViT-B-16/datacomp_xl_s13b_b90k",
    "ViT-L-14/laion2b_s32b_b82k",
    "ViT-L-14-336/openai",
    "ViT-H-14/dfn5b",
    "RN50/openai",
    "RN50x4/openai",
    "coca_ViT-B-32/laion2b_s13b_b90k",
    "EVA02-B-16/merged2b_s8b_b131k",
    "ViT-B-16-SigLIP/webli",
    "ViT-SO400M-14-SigLIP-378/webli",
    "ViT-B-32-SigLIP2-256/webli",
    "MobileCLIP-S1/datacompdr",
    "MobileCLIP2-S0/dfndr2b",
    "convnext_base_w/laion2b_s13b_b82k_augreg",
    "convnext_large_d_320/laion2b_s29b_b131k_ft_soup",
    "ViT-L-14-CLIPA/datacomp1b",
    "roberta-ViT-B-32/laion2b_s12b_b32k",
]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_open_clip(monkeypatch)


def by_open_clip(model: str, tag: str | None = None, **options: Any) -> tuple[Tensor, Any]:
    """Embeddings of the photos by open_clip, of length 1, and its transform."""
    network, _, transform = open_clip.create_model_and_transforms(model, tag, **options)
    with torch.no_grad():
        embeddings = network.eval().encode_image(torch.stack([transform(one) for one in PHOTOS]))
    return nn.functional.normalize(embeddings, dim=-1), transform


def _write_checkpoint(name: str, path: Path) -> Path:
    """A whole checkpoint as open_clip's training writes it."""
    model = shaken(open_clip.create_model(name))
    torch.save({"epoch": 3, "name": "x", "state_dict": model.state_dict()}, path)
    return path


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The file that is loaded instead of downloading a tag's weights."""
    place: dict[str, Path] = {}

    def local(config: Mapping[str, Any], **_: Any) -> str:
        return str(place["file"])

    monkeypatch.setattr(factory, "download_pretrained", local)
    return place


def activated(spec: str) -> str:
    """open_clip's name of the model with the activation that the weights of the tag need."""
    model, tag = spec.split("/")
    quick = open_clip.get_pretrained_cfg(model, tag).get("quick_gelu") and not model.endswith("-quickgelu")
    return f"{model}-quickgelu" if quick else model


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
@pytest.mark.parametrize("spec", FAMILIES)
def test_embeddings_equal_open_clip(tmp_path: Path, download: dict[str, Path], spec: str) -> None:
    """From a tag, from a file that was saved from it, and from a file together with the tag."""
    model, tag = activated(spec), spec.split("/")[1]
    download["file"] = _write_checkpoint(model, tmp_path / "tag.pt")
    encoder = load_encoder(f"open_clip:{spec}")
    expected, _ = by_open_clip(model, tag)
    assert (embedded(encoder) - expected).abs().max() < 1e-6
    assert not encoder.random_weights
    assert encoder.spec == f"open_clip:{model}/{tag}"
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    download.clear()  # a file of weights needs no download
    for again in (f"{spec}@{tmp_path}/encoder.safetensors", f"{model}@{tmp_path}/encoder.safetensors"):
        reloaded = load_encoder(f"open_clip:{again}")
        assert (reloaded.sha256, reloaded.preprocessing) == (encoder.sha256, encoder.preprocessing)
        assert torch.equal(embedded(reloaded), embedded(encoder))
    beside = load_encoder(f"open_clip:{spec}@{tmp_path}/tag.pt")
    assert (beside.sha256, beside.preprocessing) == (encoder.sha256, encoder.preprocessing)


@pytest.mark.filterwarnings("ignore:QuickGELU mismatch")
def test_every_tag_has_the_pixels_of_open_clips_transform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The networks do not matter, so every tower of timm is replaced by one that is quick to build."""
    tower = {"img_size": 32, "depth": 1, "embed_dim": 32, "num_heads": 2}
    vit = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda _, **options: vit("vit_tiny_patch16_224", **tower | options))
    monkeypatch.setattr(factory, "download_pretrained", lambda config, **_: "")
    (tmp_path / "w.pt").touch()
    seen = set()
    for model, tag in open_clip.list_pretrained():
        found = build(parse_spec(f"open_clip:{model}/{tag}@{tmp_path / 'w.pt'}"), None).preprocessing
        config = open_clip.get_pretrained_cfg(model, tag)
        size = open_clip.get_model_config(model)["vision_cfg"]["image_size"]
        settings = (found.shape, found.resize, found.interpolation, found.mean, found.std)
        names = ("resize_mode", "interpolation", "mean", "std")
        assert settings == ((3, size, size), *(config[name] for name in names)), (model, tag)
        if settings[:3] in seen:
            continue
        seen.add(settings[:3])
        _, _, transform = open_clip.create_model_and_transforms(model, tag)
        mean, std = (torch.tensor(values)[:, None, None] for values in (found.mean, found.std))
        expected = (transform(PHOTOS[1]) * std + mean) * 255
        assert (torch.from_numpy(decode(PHOTOS[1], found)) - expected).abs().max() < 1e-3, (model, tag)
    assert len(seen) > 10


@pytest.mark.parametrize("spec", ["ViT-B-32/openai", "ViT-B-16-SigLIP/webli", "EVA02-B-16/merged2b_s8b_b131k"])
def test_another_size_resamples_positions_as_open_clip_does(
    tmp_path: Path, download: dict[str, Path], capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    model, tag = activated(spec), spec.split("/")[1]
    download["file"] = _write_checkpoint(model, tmp_path / "tag.pt")
    encoder = load_encoder(f"open_clip:{spec},image_size=320")
    (line,) = capsys.readouterr().err.splitlines()
    assert all(fact in line for fact in (model, "320x320", "224x224", "open_clip"))
    expected, _ = by_open_clip(model, tag, force_image_size=320)
    assert (embedded(encoder) - expected).abs().max() < 1e-6
    assert (encoder.input_shape, encoder.preprocessing.scale) == ((3, 320, 320), (320, 320))
    save_encoder(encoder, tmp_path / "e.safetensors")
    for again in (f"{spec}@{tmp_path}/e.safetensors", f"{spec},image_size=320@{tmp_path}/e.safetensors"):
        reloaded = load_encoder(f"open_clip:{again}")
        assert reloaded.preprocessing == encoder.preprocessing
        assert torch.equal(embedded(reloaded), embedded(encoder))
    assert capsys.readouterr().err == ""


def test_convolutions_run_at_any_size(tmp_path: Path, download: dict[str, Path]) -> None:
    spec = "convnext_base_w/laion2b_s13b_b82k_augreg"
    download["file"] = _write_checkpoint("convnext_base_w", tmp_path / "tag.pt")
    encoder = load_encoder(f"open_clip:{spec},image_size=96")
    expected, _ = by_open_clip(*spec.split("/"), force_image_size=96)
    assert (embedded(encoder) - expected).abs().max() < 1e-6


def test_attention_pools_of_another_size_are_refused(tmp_path: Path, download: dict[str, Path]) -> None:
    download["file"] = _write_checkpoint("RN50-quickgelu", tmp_path / "tag.pt")
    with refused(ConfigError, "encoder", "'open_clip:RN50-quickgelu/openai,image_size=320'", "positional_embedding"):
        load_encoder("open_clip:RN50/openai,image_size=320")


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        ("ViT-L-14", ["0.481455", "activation GELU", "laion2b_s32b_b82k", "(0.5, 0.5, 0.5)", "openai", "QuickGELU"]),
        ("ViT-H-14", ["resize shortest", "resize squash", "dfn5b"]),
        ("ViT-B-32", ["activation GELU", "activation QuickGELU", "openai"]),
    ],
)
def test_a_file_without_a_tag_gets_the_preprocessing_of_most_tags(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, facts: list[str]
) -> None:
    """One warning says so, but not with `aloud=False` or for random weights."""
    file = _write_checkpoint(model, tmp_path / "w.pt")
    capsys.readouterr()
    encoder = load_encoder(f"open_clip:{model}@{file}")
    (line,) = capsys.readouterr().err.splitlines()
    missing = [fact for fact in (*facts, str(file), f"open_clip:{model}/TAG@FILE") if fact not in line]
    assert not missing, line
    assert (encoder.preprocessing.resize, encoder.preprocessing.mean) == ("shortest", open_clip.OPENAI_DATASET_MEAN)
    load_encoder(f"open_clip:{model}@{file}", aloud=False)
    load_encoder(f"open_clip:{model}")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("spec", ["ViT-B-16-SigLIP/webli", "ViT-L-14-quickgelu/openai"])
def test_a_file_without_a_tag_needs_no_warning_if_all_tags_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    model = spec.split("/")[0]
    file = _write_checkpoint(model, tmp_path / "w.pt")
    capsys.readouterr()
    alone, tagged = load_encoder(f"open_clip:{model}@{file}"), load_encoder(f"open_clip:{spec}@{file}")
    assert alone.preprocessing == tagged.preprocessing
    assert capsys.readouterr().err == ""


def _write_folder(path: Path, name: str, preprocess: Mapping[str, Any], safe: bool = True) -> nn.Module:
    """Write the folder of a random model as open_clip pushes it to the Hub; returns the model."""
    path.mkdir()
    model = shaken(open_clip.create_model(name))
    document = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    (path / "open_clip_config.json").write_text(json.dumps(document))
    if safe:
        save_file(
            {key: value.clone() for key, value in model.state_dict().items()}, path / "open_clip_model.safetensors"
        )
    else:
        torch.save(model.state_dict(), path / "open_clip_pytorch_model.bin")
    return model


PREPROCESS: list[dict[str, Any]] = [
    {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"},
    {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "longest", "fill_color": 127},
    {},
]


@pytest.mark.parametrize("preprocess", PREPROCESS)
def test_folders_are_read(tmp_path: Path, preprocess: dict[str, Any]) -> None:
    _write_folder(tmp_path / "m", "ViT-B-32", preprocess)
    encoder = load_encoder(f"open_clip:local-dir:{tmp_path / 'm'}")
    expected, _ = by_open_clip(f"local-dir:{tmp_path / 'm'}")
    assert (embedded(encoder) - expected).abs().max() < 1e-6
    assert not encoder.random_weights
    save_encoder(encoder, tmp_path / "e.safetensors")
    reloaded = load_encoder(f"open_clip:local-dir:{tmp_path / 'm'}@{tmp_path / 'e.safetensors'}")
    assert torch.equal(embedded(reloaded), embedded(encoder))


@pytest.mark.parametrize("revision", ["", "@v2"])
def test_models_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str) -> None:
    """FARE is published so. With a file of weights, only the configuration is fetched."""
    _write_folder(tmp_path / "m", "ViT-B-32-quickgelu", PREPROCESS[0], safe=False)
    requests = []

    def fetch(repository: str, filename: str = "open_clip_pytorch_model.bin", revision: Any = None, **_: Any) -> str:
        requests.append((repository, filename, revision))
        return str(tmp_path / "m" / filename)

    monkeypatch.setattr(factory, "download_pretrained_from_hf", fetch)
    spec = f"open_clip:hf-hub:org/robust{revision}"
    encoder = load_encoder(spec)
    assert {one[2] for one in requests} == {revision.removeprefix("@") or None}
    expected, _ = by_open_clip("hf-hub:org/robust")
    assert (embedded(encoder) - expected).abs().max() < 1e-6
    assert encoder.spec == spec
    save_encoder(encoder, tmp_path / "e.safetensors")
    requests.clear()
    reloaded = load_encoder(f"{spec}@{tmp_path / 'e.safetensors'}")
    assert torch.equal(embedded(reloaded), embedded(encoder))
    assert requests == [("org/robust", "open_clip_config.json", revision.removeprefix("@") or None)]


def test_folders_without_a_usable_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    spec = f"open_clip:local-dir:{folder}"
    with refused(ConfigError, "encoder", f"'{spec}'", "not found"):
        load_encoder(spec)
    _write_folder(folder, "ViT-B-32", {})
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    text, data = config.read_text(), weights.read_bytes()
    weights.write_bytes(data[:-100])
    with refused(ConfigError, "encoder", f"'{spec}'"):
        load_encoder(spec)
    weights.unlink()
    with refused(ConfigError, "encoder", f"'{spec}'", "weights"):
        load_encoder(spec)
    weights.write_bytes(data)
    config.write_text(text.replace('"width": 64', '"width": 128'))
    with refused(ConfigError, "encoder", f"'{spec}'", "size mismatch"):
        load_encoder(spec)
    config.write_text("{")
    with refused(ConfigError, "encoder", f"'{spec}'", "valid config"):
        load_encoder(spec)
    config.unlink()
    with refused(ConfigError, "encoder", f"'{spec}'", "open_clip_config.json"):
        load_encoder(spec)


def test_code_in_the_weights_of_a_folder_is_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    _write_folder(folder, "ViT-B-32", {}, safe=False)
    torch.save({"a": Exploit(tmp_path / "executed")}, folder / "open_clip_pytorch_model.bin")
    with refused(ConfigError, "encoder", f"'open_clip:local-dir:{folder}'", "plain tensors"):
        load_encoder(f"open_clip:local-dir:{folder}")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("ViT-B/32", "open_clip:ViT-B-32,"),
        ("ViT-L/14/openai", "open_clip:ViT-L-14/openai,"),
        ("ViT-B-32/opnai", "openai"),
    ],
)
def test_names_as_papers_write_them_are_refused_with_the_spec(spec: str, meant: str) -> None:
    with refused(ConfigError, "encoder", meant):
        load_encoder(f"open_clip:{spec}")


def test_a_failed_download_is_reported_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known\nTry again")

    monkeypatch.setattr(factory, "download_pretrained", cut)
    monkeypatch.setattr(factory, "download_pretrained_from_hf", cut)
    with refused(ConfigError, "encoder", "'openai'", "ConnectionError", "open_clip:ViT-B-32-quickgelu/openai@FILE"):
        load_encoder("open_clip:ViT-B-32/openai")
    with refused(ConfigError, "encoder", "'open_clip:hf-hub:chs20/fare2-clip'", "open_clip:local-dir:FOLDER"):
        load_encoder("open_clip:hf-hub:chs20/fare2-clip")


def test_an_invalid_hub_name_is_not_reported_as_a_failed_download() -> None:
    with refused(ConfigError, "encoder", "'open_clip:hf-hub:a/b/c'", "Repo id must be"):
        load_encoder("open_clip:hf-hub:a/b/c")
