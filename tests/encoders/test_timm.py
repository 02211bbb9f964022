"""Networks of timm by their specs: pixels and embeddings equal those of timm's pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from datamerge.encoders import load_encoder, parse_spec, save_encoder
from datamerge.encoders.timm_models import read_config
from datamerge.sources import decode
from storage_schemas import ConfigError
from tests.support.photos import PHOTOS, Exploit, embedded, photo
from tests.support.refusals import refused
from tests.support.small_models import shaken, shrink_timm, timm

TAGS = [
    "test_vit/r160_in1k",
    "test_resnet/r160_in1k",
    "test_efficientnet/r160_in1k",
    "vit_base_patch16_224/augreg_in1k",
    "vit_base_patch16_clip_224/openai",
    "vit_small_patch14_reg4_dinov2/lvd142m",
    "vit_base_patch16_siglip_256/webli",
    "convnext_tiny/fb_in22k_ft_in1k_384",
    "convnext_base/clip_laion2b_augreg",
    "resnet50/a1_in1k",
    "resnet50/tv2_in1k",
    "eva02_base_patch14_224/mim_in22k",
]

data: Any = timm.data


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink_timm(monkeypatch)


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """The file that is loaded instead of downloading weights."""
    place: dict[str, Path] = {}
    builder: Any = timm.models._builder
    monkeypatch.setattr(
        builder, "load_state_dict_from_hf", lambda *_, **__: torch.load(place["file"], weights_only=True)
    )
    return place


def by_timm(name: str, **options: Any) -> Tensor:
    """Embeddings of the photos by timm's pipeline, of length 1."""
    size = {"input_size": (3, options["img_size"], options["img_size"])} if "img_size" in options else {}
    model = timm.create_model(name, pretrained=True, num_classes=0, **options).eval()
    transform = data.create_transform(**data.resolve_model_data_config(model, size))
    with torch.no_grad():
        return nn.functional.normalize(model(torch.stack([transform(one) for one in PHOTOS])), dim=-1)


def _write_weights(name: str, path: Path) -> Path:
    """Write the weights of a random classifier."""
    torch.save(shaken(timm.create_model(name)).state_dict(), path)
    return path


@pytest.mark.parametrize("spec", TAGS)
def test_embeddings_equal_timm(tmp_path: Path, download: dict[str, Path], spec: str) -> None:
    """From a tag, from a file that was saved from it, and from a file together with the tag."""
    name = spec.replace("/", ".")
    download["file"] = _write_weights(name, tmp_path / "tag.pt")
    encoder = load_encoder(f"timm:{spec}")
    assert (embedded(encoder) - by_timm(name)).abs().max() < 1e-6
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    download.clear()  # a file of weights needs no download
    model = spec.split("/")[0]
    for again in (f"{spec}@{tmp_path}/encoder.safetensors", f"{model}@{tmp_path}/encoder.safetensors"):
        reloaded = load_encoder(f"timm:{again}")
        assert (reloaded.sha256, reloaded.preprocessing) == (encoder.sha256, encoder.preprocessing)
        assert torch.equal(embedded(reloaded), embedded(encoder))
    beside = load_encoder(f"timm:{spec}@{tmp_path}/tag.pt")
    assert (beside.sha256, beside.preprocessing) == (encoder.sha256, encoder.preprocessing)


def test_every_tag_has_the_pixels_of_timms_transform() -> None:
    """Each distinct preprocessing is tested once, as timm configures it."""
    spec, small = parse_spec("timm:resnet50"), photo(97, 131)
    distinct = {}
    for name in timm.list_pretrained():
        tag: Any = timm.get_pretrained_cfg(name)
        config = data.resolve_data_config(pretrained_cfg=tag.to_dict())
        distinct[tuple(config.values())] = config
    assert len(distinct) > 100
    for config in distinct.values():
        found = read_config(config, spec)
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ("mean", "std"))
        expected = (data.create_transform(**config)(small) * std + mean) * 255
        assert (torch.from_numpy(decode(small, found)) - expected).abs().max() < 1e-3, config


@pytest.mark.parametrize("spec", ["vit_base_patch16_224/augreg_in1k", "vit_small_patch14_reg4_dinov2/lvd142m"])
def test_another_size_resamples_positions_as_timm_does(
    tmp_path: Path, download: dict[str, Path], capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    name = spec.replace("/", ".")
    download["file"] = _write_weights(name, tmp_path / "tag.pt")
    encoder = load_encoder(f"timm:{spec},image_size=112")
    (line,) = capsys.readouterr().err.splitlines()
    tag: Any = timm.get_pretrained_cfg(name)
    native = tag.input_size[1]
    assert all(fact in line for fact in (spec.split("/")[0], "112x112", f"{native}x{native}", "timm"))
    assert (embedded(encoder) - by_timm(name, img_size=112)).abs().max() < 1e-6
    save_encoder(encoder, tmp_path / "e.safetensors")
    for again in (f"{spec}@{tmp_path}/e.safetensors", f"{spec},image_size=112@{tmp_path}/e.safetensors"):
        reloaded = load_encoder(f"timm:{again}")
        assert reloaded.preprocessing == encoder.preprocessing
        assert torch.equal(embedded(reloaded), embedded(encoder))
    assert capsys.readouterr().err == ""


def test_the_scale_follows_the_size() -> None:
    """By crop_pct: 224 of 248 pixels, hence 96 of 106."""
    assert load_encoder("timm:vit_base_patch16_224").preprocessing.scale == (248, 248)
    assert load_encoder("timm:vit_base_patch16_224,image_size=96").preprocessing.scale == (106, 106)
    assert load_encoder("timm:test_resnet,image_size=96").preprocessing.scale == (101, 101)


def test_networks_of_one_size_refuse_others() -> None:
    with refused(ConfigError, "encoder", "image_size=224", "timm:coat_lite_tiny", "96"):
        load_encoder("timm:coat_lite_tiny,image_size=96")


def test_a_file_without_a_tag_gets_the_preprocessing_of_timms_first_tag(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = _write_weights("vit_base_patch16_224", tmp_path / "w.pt")
    encoder = load_encoder(f"timm:vit_base_patch16_224@{file}")
    assert encoder.preprocessing.mean == (0.5, 0.5, 0.5)
    (line,) = capsys.readouterr().err.splitlines()
    assert all(
        fact in line
        for fact in (str(file), "mean 0.5", "(0.485, 0.456, ", "mae", "timm:vit_base_patch16_224/TAG@FILE")
    )
    load_encoder(f"timm:vit_base_patch16_224,image_size=96@{file}")
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "TAG@FILE" in line)
    assert "shape" not in line  # the spec sets the size, so tags do not differ in it
    load_encoder(f"timm:test_vit@{_write_weights('test_vit', file)}")  # it has only one tag
    assert capsys.readouterr().err == ""


def _write_folder(path: Path, safe: bool = True) -> nn.Module:
    """Write the folder of a random classifier as timm pushes it to the Hub; returns the classifier."""
    model = shaken(timm.create_model("test_vit", num_classes=7))
    data_config = {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.8, "crop_mode": "squash", "interpolation": "bilinear"}
    timm.models._hub.save_for_hf(model, str(path), safe_serialization=safe, data_config=data_config)
    return model


@pytest.mark.parametrize("safe", [True, False])
def test_folders_are_read(tmp_path: Path, safe: bool) -> None:
    _write_folder(tmp_path / "m", safe)
    encoder = load_encoder(f"timm:local-dir:{tmp_path / 'm'}")
    assert (embedded(encoder) - by_timm(f"local-dir:{tmp_path / 'm'}")).abs().max() < 1e-6
    assert (encoder.preprocessing.resize, encoder.preprocessing.scale) == ("squash", (200, 200))
    assert not encoder.random_weights
    save_encoder(encoder, tmp_path / "e.safetensors")
    reloaded = load_encoder(f"timm:local-dir:{tmp_path / 'm'}@{tmp_path / 'e.safetensors'}")
    assert torch.equal(embedded(reloaded), embedded(encoder))


def test_models_of_the_hub(tmp_path: Path, download: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _write_folder(tmp_path / "m", safe=False)
    download["file"] = tmp_path / "m" / "pytorch_model.bin"
    requests = []

    def fetch(repository: str, filename: str, **_: Any) -> str:
        requests.append((repository, filename))
        return str(tmp_path / "m" / filename)

    monkeypatch.setattr(timm.models._hub, "download_from_hf", fetch)
    encoder = load_encoder("timm:hf-hub:org/name@v2")
    assert requests == [("org/name@v2", "config.json")]
    assert (embedded(encoder) - by_timm("hf-hub:org/name@v2")).abs().max() < 1e-6
    assert encoder.spec == "timm:hf-hub:org/name@v2"


def test_folders_without_a_usable_model_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    spec = f"timm:local-dir:{folder}"
    with refused(ConfigError, "encoder", f"'{spec}'", "config.json"):
        load_encoder(spec)
    _write_folder(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    document, data = json.loads(config.read_text()), weights.read_bytes()
    weights.write_bytes(data[:-100])
    with refused(ConfigError, "encoder", f"'{spec}'"):
        load_encoder(spec)
    state = load(data)
    weights.write_bytes(save({name: state[name] for name in state if name != "blocks.0.norm1.weight"}))
    with refused(ConfigError, "encoder", f"'{spec}'", "blocks.0.norm1.weight"):
        load_encoder(spec)
    weights.write_bytes(data)
    config.write_text(json.dumps({**document, "architecture": "test_nothing"}))
    with refused(ConfigError, "encoder", f"'{spec}'", "test_nothing"):
        load_encoder(spec)
    config.write_text(json.dumps(document))
    weights.unlink()
    torch.save({"a": Exploit(tmp_path / "executed")}, folder / "pytorch_model.bin")
    with refused(ConfigError, "encoder", f"'{spec}'", "plain tensors"):
        load_encoder(spec)
    assert not (tmp_path / "executed").exists()


def test_a_failed_download_is_reported_with_an_alternative(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> str:
        raise ConnectionError("Name or service not known\nTry again")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", cut)
    with refused(ConfigError, "encoder", "'r160_in1k'", "ConnectionError", "timm:test_vit/r160_in1k@FILE"):
        load_encoder("timm:test_vit/r160_in1k")
    with refused(ConfigError, "encoder", "'timm:hf-hub:org/name'", "timm:local-dir:FOLDER"):
        load_encoder("timm:hf-hub:org/name")
