"""Exports of every architecture, loaded as their user would and by us again: the same pixels and embeddings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, save_encoder
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from datamerge.sources import decode
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.export.command import export
from trainer.export.hugging_face_folder import as_transformers_does
from trainer.export.open_clip_folder import write_open_clip

MakeArtifact = Callable[..., str]
TAG = "test"
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SHORTEST = {"interpolation": "bicubic", "resize_mode": "shortest"}
SQUASH = {"interpolation": "bicubic", "resize_mode": "squash"}
TEXT = {"context_length": 8, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
# Architecture → configuration of open_clip, and that of its weights.
ZOO: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "zoo-clip-quickgelu": ({"vision_cfg": VIT, "quick_gelu": True}, {**OPENAI, **SHORTEST, "quick_gelu": True}),
    "zoo-laion": ({"vision_cfg": VIT}, {**INCEPTION, **SHORTEST}),
    "zoo-siglip": (
        {
            "vision_cfg": {
                "timm_model_name": "test_vit3",
                "image_size": 160,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "custom_text": True,
            "init_logit_bias": -10,
        },
        {**INCEPTION, **SQUASH},
    ),
    "zoo-convnext": (
        {"vision_cfg": {"timm_model_name": "test_convnext", "image_size": 48, "timm_proj": "linear"}},
        {**OPENAI, "interpolation": "bilinear", "resize_mode": "squash"},
    ),
    "zoo-resnet": (
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}},
        {**OPENAI, **SHORTEST},
    ),
    "zoo-coca": (
        {
            "vision_cfg": {**VIT, "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
            "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
            "custom_text": True,
        },
        {**OPENAI, **SHORTEST},
    ),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with configurations, and the whole models' weights as open_clip itself saves them."""
    make_torchvision_importable()
    import open_clip
    import transformers
    from tokenizers import Tokenizer, models

    folder = tmp_path_factory.mktemp("zoo")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "photo": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, (config, _) in ZOO.items():
        full = {"embed_dim": 64 if name == "zoo-siglip" else 24, "text_cfg": TEXT, **config}
        if name == "zoo-siglip":
            full["text_cfg"] = {**TEXT, "hf_tokenizer_name": str(folder / "tokenizer")}
        (folder / f"{name}.json").write_text(json.dumps(full))
    open_clip.add_model_config(folder)
    for name in ZOO:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = open_clip.create_model(name)
            for parameter in model.parameters():
                parameter.data += 0.05 * torch.randn(parameter.shape)
        torch.save(model.state_dict(), folder / f"{name}.pt")
    return folder


@pytest.fixture
def tags(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`open_clip:NAME/test` for all of the zoo; only the download is replaced."""
    import open_clip

    for name, (_, tag) in ZOO.items():
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {TAG: {"url": name, "hf_hub": "", **tag}})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(zoo / f"{cfg['url']}.pt"))
    return zoo


def _tuned(spec: str, folder: Path) -> Encoder:
    """The encoder of a spec with other weights, as a run would leave it."""
    encoder = load_encoder(spec)
    generator = torch.Generator().manual_seed(2)
    for parameter in encoder.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_encoder(encoder, folder / "encoder.safetensors")
    return load_encoder(f"{spec}@{folder / 'encoder.safetensors'}")


def _photos() -> list[Image.Image]:
    rng = np.random.default_rng(7)
    sizes = ((61, 83), (97, 50), (200, 33), (181, 243))
    return [Image.fromarray(rng.integers(0, 256, (*size, 3)).astype(np.uint8)) for size in sizes]


def _embed(encoder: Encoder, photos: list[Image.Image]) -> Tensor:
    pixels = np.stack([decode(photo, encoder.preprocessing) for photo in photos])
    with torch.no_grad():
        return encoder(torch.from_numpy(pixels).float() / 255)


@pytest.mark.parametrize("name", ZOO)
def test_a_folder_of_open_clip_is_the_tuned_model(
    tags: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    encoder = _tuned(f"open_clip:{name}/{TAG}", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_open_clip(encoder, f"open_clip:{name}/{TAG}", out)
    assert capsys.readouterr().err == ""

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    photos = _photos()
    with torch.no_grad():
        found = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]), normalize=False)
    torch.testing.assert_close(found, _embed(encoder, photos), rtol=1e-4, atol=1e-5)
    # All but the image tower is the original's, to the bit.
    original = torch.load(tags / f"{name}.pt", weights_only=True)
    exported = model.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original if not key.startswith("visual."))
    words = open_clip.get_tokenizer(f"local-dir:{out}")(["a photo"])
    assert torch.equal(words, open_clip.get_tokenizer(name)(["a photo"]))

    # Read back: the folder, and the file with and without the name of what it belongs to.
    for spec in (f"open_clip:local-dir:{out}", f"open_clip:{name}/{TAG}@{out / 'visual.pt'}"):
        again = load_encoder(spec)
        assert again.sha256 == encoder.sha256
        assert again.preprocessing == encoder.preprocessing
        torch.testing.assert_close(_embed(again, photos), _embed(encoder, photos))


def test_without_a_text_tower_the_image_tower_is_written(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    encoder = _tuned("open_clip:zoo-laion", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    usage = write_open_clip(encoder, "open_clip:zoo-laion", out)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "text tower" in line
    assert "open_clip_model.safetensors" in line
    assert sorted(file.name for file in out.iterdir()) == ["open_clip_config.json", "visual.pt"]
    assert 'pretrained_image_path="visual.pt"' in usage
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{out}", pretrained_image_path=str(out / "visual.pt")
    )
    photos = _photos()
    with torch.no_grad():
        found = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]))
    torch.testing.assert_close(found, _embed(encoder, photos), rtol=1e-4, atol=1e-5)
    again = load_encoder(f"open_clip:local-dir:{out}@{out / 'visual.pt'}")
    assert (again.sha256, again.preprocessing) == (encoder.sha256, encoder.preprocessing)


@pytest.mark.parametrize("name", ["zoo-clip-quickgelu", "zoo-laion", "zoo-siglip"])
def test_a_run_computes_the_same_wherever_it_goes(
    make_artifact: MakeArtifact, tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Saved, moved, loaded, exported, loaded again: one function of photos."""
    start = load_encoder(f"open_clip:{name}/{TAG}")
    artifact = make_artifact(name="artifact", shape=start.input_shape, width=start.embedding_dim, encoder=start.spec)
    run, photos = tmp_path / "run", _photos()
    summary = train(TrainConfig(artifact=artifact, run=str(run), steps=2, batch_size=5, learning_rate=1e-3))
    encoder = load_encoder(summary.encoder)
    expected = _embed(encoder, photos)
    assert encoder.preprocessing.mean == ZOO[name][1]["mean"]
    assert not torch.allclose(expected, _embed(start, photos), rtol=1e-3)

    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(run, moved)
    out = tmp_path / "out"
    export(str(moved), "open_clip", str(out))
    for spec in (f"open_clip:{name}/{TAG}@{moved / 'encoder.safetensors'}", f"open_clip:local-dir:{out}"):
        again = load_encoder(spec)
        assert (again.sha256, again.preprocessing) == (summary.encoder_sha256, encoder.preprocessing)
        torch.testing.assert_close(_embed(again, photos), expected, rtol=0, atol=0)
    _run_card(out, photos[0], monkeypatch, expected[:1])

    card = (out / "README.md").read_text()
    assert f"{encoder.preprocessing}" in card
    if name == "zoo-siglip":
        with refused(ConfigError, "to", "TimmModel"):
            export(str(moved), "hf", str(tmp_path / "hf"))
        return
    export(str(moved), "hf", str(tmp_path / "hf"))
    again = load_encoder(f"hf:{tmp_path / 'hf'}")
    assert again.preprocessing == as_transformers_does(encoder.preprocessing)
    # Where transformers cuts the same square, it computes the same.
    same = [photo for photo in photos if _agree(photo, encoder.preprocessing, again.preprocessing)]
    assert len(same) >= 2
    torch.testing.assert_close(_embed(again, same), _embed(encoder, same), rtol=1e-4, atol=1e-5)
    _run_card(tmp_path / "hf", same[0], monkeypatch, _embed(encoder, same[:1]), 0.05)


def _agree(photo: Image.Image, one: Preprocessing, other: Preprocessing) -> bool:
    return np.array_equal(decode(photo, one), decode(photo, other))


def _run_card(
    folder: Path, photo: Image.Image, monkeypatch: pytest.MonkeyPatch, expected: Tensor, tolerance: float = 1e-4
) -> None:
    """The lines of the model card do what they say."""
    photo.save(folder / "photo.png")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code.replace("photo.jpg", "photo.png"), names)
    torch.testing.assert_close(names["embeddings"], expected, rtol=tolerance, atol=tolerance)
