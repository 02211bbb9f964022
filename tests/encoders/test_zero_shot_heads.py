"""Logits of encoders with their zero-shot heads, against those of open_clip and transformers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from datamerge.encoders import Encoder, Head, load_encoder, load_head, parse_spec, save_encoder
from datamerge.encoders.text_towers import load_text_tower
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from tests.support.refusals import refused
from tests.support.runs import write_run
from tests.support.small_hugging_face import WORDS, save_tokenizer, small_hugging_face

make_torchvision_importable()

import open_clip  # noqa: E402 - it imports torchvision
import transformers  # noqa: E402 - likewise

NAMES, PROMPTS = ["cat", "red bus", "tree"], ["a photo of a {}.", "a {}"]
VISION = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CONFIGS: Mapping[str, dict[str, Any]] = {
    "clip": {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT},
    "sigmoid": {
        "embed_dim": 24,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": {**TEXT, "context_length": 16, "no_causal_mask": True, "pool_type": "last"},
    },
    "coca": {
        "embed_dim": 24,
        "custom_text": True,
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 1, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "context_length": 76},
    },
}
PIXELS = torch.rand((4, 3, 32, 32), generator=torch.Generator().manual_seed(0))


def _name(kind: str) -> str:
    return f"datamerge-heads-{kind}"


@pytest.fixture(scope="module", autouse=True)
def _configurations(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configurations")
    for kind, config in CONFIGS.items():
        (folder / f"{_name(kind)}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def add_tag(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], str]:
    """Register a file as the tag of a model; only the download is replaced."""

    def add(name: str, file: Path) -> str:
        tag = {"url": "https://nowhere", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "resize_mode": "squash"}
        config = {"interpolation": "bilinear", "hf_hub": "", **tag}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"mine": config})
        monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(file))
        return f"open_clip:{name}/mine"

    return add


def _model(name: str, seed: int = 1) -> Any:
    """A model with random parameters, including the logit scale and bias."""
    torch.manual_seed(seed)
    model = open_clip.create_model(name)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.rand_like(tensor))
    return model.eval()


def _expected(model: Any, tokenizer: Any, encoder: Encoder) -> Tensor:
    """Logits from open_clip's features, scale and bias."""
    with torch.no_grad():
        images = model.encode_image((PIXELS - encoder.mean) / encoder.std, normalize=True)
        texts = [tokenizer([prompt.format(name) for prompt in PROMPTS]) for name in NAMES]
        means = torch.stack([model.encode_text(text, normalize=True).mean(0) for text in texts])
        logits: Tensor = model.logit_scale.exp() * images @ torch.nn.functional.normalize(means, dim=1).T
        bias: Tensor | None = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias


def _logits(spec: str) -> tuple[Encoder, Head, Tensor]:
    encoder, head = load_encoder(spec), load_head(spec, NAMES, PROMPTS)
    with torch.no_grad():
        return encoder, head, head(encoder(PIXELS))


@pytest.mark.parametrize("form", ["tag", "file", "wrapped file", "tag and image tower", "local-dir", "random"])
def test_logits_equal_open_clip(
    kind: str, form: str, tmp_path: Path, add_tag: Callable[[str, Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = _name(kind)
    model, file = _model(name), tmp_path / "weights.pt"
    torch.save(model.state_dict(), file)
    if form == "tag":
        spec = add_tag(name, file)
    elif form == "file":
        spec = f"open_clip:{name}@{file}"
    elif form == "wrapped file":
        state = {f"module.{key}": value for key, value in model.state_dict().items()}
        torch.save({"epoch": 3, "state_dict": state}, file)
        spec = f"open_clip:{name}@{file}"
    elif form == "tag and image tower":
        # FARE's protocol: a tuned image tower goes with the text tower that it was tuned towards.
        tag, tuned = add_tag(name, file), _model(name, 2)
        torch.save(tuned.visual.state_dict(), tmp_path / "visual.pt")
        spec = f"{tag}@{tmp_path / 'visual.pt'}"
        model.visual = tuned.visual
    elif form == "local-dir":
        (tmp_path / "open_clip_config.json").write_text(
            json.dumps({"model_cfg": CONFIGS[kind], "preprocess_cfg": {}})
        )
        save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
        file.unlink()
        spec = f"open_clip:local-dir:{tmp_path}"
    else:
        from datamerge.encoders.building import seeded

        with seeded():
            model = open_clip.create_model(name).eval()
        spec = f"open_clip:{name}"
    encoder, head, logits = _logits(spec)
    assert (head.bias is None) == (kind != "sigmoid")
    assert head.names == NAMES
    torch.testing.assert_close(logits, _expected(model, open_clip.get_tokenizer(name), encoder), atol=1e-5, rtol=1e-5)


def test_openais_names_are_read_into_a_custom_text_tower(tmp_path: Path) -> None:
    """As open_clip reads them; the bias, which the file lacks, is 0."""
    name = _name("sigmoid")
    config = {**CONFIGS["sigmoid"], "custom_text": False}
    (tmp_path / "datamerge-heads-plain.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    state = _model("datamerge-heads-plain").state_dict()
    del state["logit_bias"]
    state["logit_scale"] = state["logit_scale"].reshape(1)
    torch.save(state, tmp_path / "plain.pt")
    model = open_clip.create_model(name, pretrained=str(tmp_path / "plain.pt")).eval()
    encoder, head, logits = _logits(f"open_clip:{name}@{tmp_path}/plain.pt")
    assert head.bias is not None
    assert not head.bias.any()
    torch.testing.assert_close(logits, _expected(model, open_clip.get_tokenizer(name), encoder), atol=1e-5, rtol=1e-5)


def test_the_tokeniser_of_a_local_folder_is_used(tmp_path: Path) -> None:
    text = {**CONFIGS["sigmoid"]["text_cfg"], "vocab_size": len(WORDS), "hf_tokenizer_name": "somebody/else"}
    config = {**CONFIGS["sigmoid"], "text_cfg": text}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False).eval()
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    save_tokenizer(tmp_path)
    encoder, _, logits = _logits(f"open_clip:local-dir:{tmp_path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    torch.testing.assert_close(logits, _expected(model, tokenizer, encoder), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@pytest.mark.parametrize("form", ["folder", "run", "whole file"])
def test_logits_equal_transformers(family: str, form: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = small_hugging_face(family, folder)
    spec = head_spec = f"hf:{folder}"
    if form == "run":
        tuned = load_encoder(spec)
        with torch.no_grad():
            next(tuned.parameters()).mul_(1.5)
        spec = write_run(tmp_path / "run", spec, sha256=tuned.sha256)
        save_encoder(tuned, spec.partition("@")[2])
        _record(tmp_path / "run", tuned)
        spec = head_spec = str(tmp_path / "run")
    elif form == "whole file":
        model = small_hugging_face(family, tmp_path / "other", seed=2)
        head_spec = f"{spec}@{tmp_path}/other/model.safetensors"
        spec = f"hf:{tmp_path / 'other'}"
    head = load_head(head_spec, NAMES, ["a photo of a {}."])
    encoder = load_encoder(f"hf:{folder}@{tmp_path}/run/encoder.safetensors" if form == "run" else spec)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    padding: dict[str, Any] = {"padding": "max_length", "max_length": 64} if family == "Siglip" else {"padding": True}
    tokens = tokenizer([f"a photo of a {name}." for name in NAMES], return_tensors="pt", truncation=True, **padding)
    with torch.no_grad():
        if form == "run":
            next(model.vision_model.parameters()).mul_(1.5)
        expected = model(pixel_values=(PIXELS - encoder.mean) / encoder.std, **tokens).logits_per_image
        torch.testing.assert_close(head(encoder(PIXELS)), expected, atol=1e-5, rtol=1e-5)
    assert (head.bias is None) == (family == "CLIP")


def _record(folder: Path, encoder: Encoder) -> None:
    facts = json.loads((folder / "run.json").read_text())
    facts["preprocessing"] = encoder.preprocessing.record()
    (folder / "run.json").write_text(json.dumps(facts))


def test_a_run_has_the_head_of_the_encoder_it_started_from(
    tmp_path: Path, add_tag: Callable[[str, Path], str]
) -> None:
    """By the run's folder and by its encoder's spec, in place and moved; also a run of a run, and of a file."""
    name = _name("clip")
    torch.save(_model(name).state_dict(), tmp_path / "whole.pt")
    for number, original in enumerate(
        (add_tag(name, tmp_path / "whole.pt"), f"open_clip:{name}@{tmp_path}/whole.pt")
    ):
        expected = load_head(original, NAMES).weight
        encoder = load_encoder(original)
        spec = original
        for round_ in "ab":
            folder = tmp_path / f"{number}{round_}"
            spec = write_run(folder, spec, sha256=round_, started="a")
            save_encoder(encoder, folder / "encoder.safetensors")
            _record(folder, encoder)
            assert torch.equal(load_head(spec, NAMES).weight, expected)
            assert torch.equal(load_head(str(folder), NAMES).weight, expected)
        moved = folder.rename(tmp_path / f"{number}moved")
        assert torch.equal(load_head(str(moved), NAMES).weight, expected)


def test_a_text_tower_is_loaded_without_the_image_tower(tmp_path: Path, kind: str) -> None:
    torch.save(_model(_name(kind)).state_dict(), tmp_path / "w.pt")
    for spec in (f"open_clip:{_name(kind)}", f"open_clip:{_name(kind)}@{tmp_path}/w.pt"):
        tower = load_text_tower(parse_spec(spec))
        assert not any(name.startswith(("visual", "text_decoder")) for name, _ in tower.model.named_parameters())
    small_hugging_face("CLIP", tmp_path / "hf")
    model = load_text_tower(parse_spec(f"hf:{tmp_path}/hf")).model
    assert not any("vis" in name for name, _ in model.named_parameters())


def test_an_image_tower_without_a_tag_has_no_head(tmp_path: Path) -> None:
    torch.save(_model(_name("clip")).visual.state_dict(), tmp_path / "visual.pt")
    with refused(ConfigError, "head", tmp_path / "visual.pt", f"open_clip:{_name('clip')}/TAG"):
        load_head(f"open_clip:{_name('clip')}@{tmp_path}/visual.pt", NAMES)


def test_an_incomplete_text_tower_is_refused(tmp_path: Path) -> None:
    state = _model(_name("clip")).state_dict()
    del state["ln_final.weight"]
    torch.save(state, tmp_path / "torn.pt")
    with refused(ConfigError, "head", tmp_path / "torn.pt", "'ln_final.weight'", 1):
        load_head(f"open_clip:{_name('clip')}@{tmp_path}/torn.pt", NAMES)


def test_vision_models_of_transformers_have_no_head(tmp_path: Path) -> None:
    config = small_hugging_face("CLIP", tmp_path / "whole").config.vision_config
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "vision")
    with refused(ConfigError, "head", tmp_path / "vision", "clip_vision_model", "hf:"):
        load_head(f"hf:{tmp_path}/vision", NAMES)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_folder_without_a_tokeniser_is_refused(family: str, tmp_path: Path) -> None:
    """Without its files, transformers makes one without words."""
    small_hugging_face(family, tmp_path / "model")
    for file in (tmp_path / "model").glob("tokenizer*"):
        file.unlink()
    with refused(ConfigError, "head", tmp_path / "model", "tokeniser", ".safetensors"):
        load_head(f"hf:{tmp_path}/model", NAMES)


def test_a_tokeniser_that_cannot_be_fetched_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = {**TEXT, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP"}
    (tmp_path / "datamerge-heads-far.json").write_text(json.dumps({**CONFIGS["clip"], "text_cfg": text}))
    open_clip.add_model_config(tmp_path)

    def offline(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", offline)
    with refused(ConfigError, "head", "open_clip:datamerge-heads-far", "tokeniser", "OSError", ".safetensors"):
        load_head("open_clip:datamerge-heads-far", NAMES)


def test_a_tokeniser_with_ids_beyond_the_text_towers_is_refused(tmp_path: Path) -> None:
    small_hugging_face("CLIP", tmp_path)
    facts = json.loads((tmp_path / "tokenizer.json").read_text())
    facts["model"]["vocab"]["cat"] = 500
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    with refused(ConfigError, "head", tmp_path, "tokeniser", "IndexError"):
        load_head(f"hf:{tmp_path}", NAMES)


def test_a_text_tower_that_diverged_is_refused(tmp_path: Path) -> None:
    state = _model(_name("clip")).state_dict()
    state["logit_scale"].fill_(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    with refused(ConfigError, "head", tmp_path / "nan.pt", "NaN"):
        load_head(f"open_clip:{_name('clip')}@{tmp_path}/nan.pt", NAMES)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The number of classes of each head that is computed; the cache is empty at first."""
    calls: list[int] = []
    original = open_clip.build_zero_shot_classifier

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[2]))
        return original(*arguments)

    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", counted)
    monkeypatch.setenv("DATAMERGE_CACHE", str(tmp_path / "cache"))
    return calls


def test_heads_are_cached_by_the_contents_of_their_inputs(tmp_path: Path, computed: list[int]) -> None:
    """The name of the file does not matter; other weights with the same name and time are recognised."""
    spec, file = f"open_clip:{_name('sigmoid')}", tmp_path / "a.pt"
    torch.save(_model(_name("sigmoid")).state_dict(), file)
    first = load_head(f"{spec}@{file}", NAMES, PROMPTS)
    shutil.copy(file, tmp_path / "b.pt")
    again = load_head(f"{spec}@{tmp_path}/b.pt", NAMES, PROMPTS)
    assert computed == [3]
    assert again.to_bytes() == first.to_bytes()
    stat = file.stat()
    torch.save(_model(_name("sigmoid"), 2).state_dict(), file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not torch.equal(load_head(f"{spec}@{file}", NAMES, PROMPTS).weight, first.weight)
    load_head(f"{spec}@{file}", NAMES[:2], PROMPTS)
    load_head(f"{spec}@{file}", NAMES, PROMPTS[:1])
    assert computed == [3, 3, 2, 3]
    assert len(list((tmp_path / "cache/heads").iterdir())) == 4


def test_a_damaged_or_unusable_cache_costs_only_time(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"open_clip:{_name('clip')}"
    expected = load_head(spec, NAMES).to_bytes()
    (file,) = (tmp_path / "cache/heads").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert load_head(spec, NAMES).to_bytes() == expected
    assert file.read_bytes() == whole
    monkeypatch.setenv("DATAMERGE_CACHE", str(file))
    assert load_head(spec, NAMES).to_bytes() == expected
    assert computed == [3, 3, 3]


def test_the_cache_is_where_the_environment_says(
    tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"open_clip:{_name('clip')}"
    monkeypatch.delenv("DATAMERGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_head(spec, NAMES)
    assert len(list((tmp_path / "xdg/datamerge/heads").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    load_head(spec, NAMES)
    load_head(spec, NAMES, shelf=tmp_path / "shelf")
    assert computed == [3, 3]
    names = [file.name for file in (tmp_path / "home/.cache/datamerge/heads").iterdir()]
    assert [file.name for file in (tmp_path / "shelf").iterdir()] == names
