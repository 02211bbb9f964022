"""Exports of every architecture, loaded by their library and by us: the same pixels and embeddings."""

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
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import decode
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.exports import embed, odd_photos, run_card, tuned
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.export.command import export
from trainer.export.hugging_face_folder import in_transformers, write_hugging_face
from trainer.export.open_clip_folder import write_open_clip
from trainer.export.timm_folder import write_timm

MakeArtifact = Callable[..., str]
TAG = "test"
INCEPTION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
OPENAI = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
SHORTEST = {"interpolation": "bicubic", "resize_mode": "shortest"}
SQUASH = {"interpolation": "bicubic", "resize_mode": "squash"}
TEXT = {"context_length": 8, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
# By architecture: open_clip's configuration of the model, and that of its weights.
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
    """Register `open_clip:NAME/test` for all models of the zoo; only the download is replaced."""
    import open_clip

    for name, (_, tag) in ZOO.items():
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {TAG: {"url": name, "hf_hub": "", **tag}})
    monkeypatch.setattr("open_clip.factory.download_pretrained", lambda cfg, **_: str(zoo / f"{cfg['url']}.pt"))
    return zoo


@pytest.mark.parametrize("name", ZOO)
def test_an_open_clip_folder_loads_as_the_tuned_model(
    tags: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    encoder = tuned(f"open_clip:{name}/{TAG}", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_open_clip(encoder, f"open_clip:{name}/{TAG}", out)
    assert capsys.readouterr().err == ""

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    photos = odd_photos()
    with torch.no_grad():
        found = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]), normalize=False)
    torch.testing.assert_close(found, embed(encoder, photos), rtol=1e-4, atol=1e-5)
    # Everything but the image tower equals the original bit for bit.
    original = torch.load(tags / f"{name}.pt", weights_only=True)
    exported = model.state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[key], original[key]) for key in original if not key.startswith("visual."))
    words = open_clip.get_tokenizer(f"local-dir:{out}")(["a photo"])
    assert torch.equal(words, open_clip.get_tokenizer(name)(["a photo"]))

    # Read back: the folder, and the weights file with the name of its model.
    for spec in (f"open_clip:local-dir:{out}", f"open_clip:{name}/{TAG}@{out / 'visual.pt'}"):
        again = load_encoder(spec)
        assert again.sha256 == encoder.sha256
        assert again.preprocessing == encoder.preprocessing
        torch.testing.assert_close(embed(again, photos), embed(encoder, photos))


def test_without_a_text_tower_only_the_image_tower_is_written(
    zoo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    encoder = tuned("open_clip:zoo-laion", tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    folder = write_open_clip(encoder, "open_clip:zoo-laion", out)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "WARNING" in line]
    assert "text tower" in line
    assert "open_clip_model.safetensors" in line
    assert sorted(file.name for file in out.iterdir()) == ["open_clip_config.json", "visual.pt"]
    assert 'pretrained_image_path="visual.pt"' in folder.usage
    assert "no text tower" in folder.note
    model, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{out}", pretrained_image_path=str(out / "visual.pt")
    )
    photos = odd_photos()
    with torch.no_grad():
        found = model.eval().encode_image(torch.stack([preprocess(photo) for photo in photos]))
    torch.testing.assert_close(found, embed(encoder, photos), rtol=1e-4, atol=1e-5)
    again = load_encoder(f"open_clip:local-dir:{out}@{out / 'visual.pt'}")
    assert (again.sha256, again.preprocessing) == (encoder.sha256, encoder.preprocessing)


def test_a_whole_checkpoint_provides_the_text_tower(tags: Path, tmp_path: Path) -> None:
    """Its names have the prefixes of training wrappers, which open_clip itself would not remove."""
    original = torch.load(tags / "zoo-coca.pt", weights_only=True)
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in original.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "epoch_3.pt")
    start = f"open_clip:zoo-coca@{tmp_path / 'epoch_3.pt'}"
    encoder = load_encoder(start)
    (tmp_path / "out").mkdir()
    write_open_clip(encoder, start, tmp_path / "out")
    found = load_file(tmp_path / "out/open_clip_model.safetensors")
    assert found.keys() == original.keys()
    assert all(torch.equal(found[name], original[name]) for name in found)


def test_an_export_can_be_tuned_and_exported_again(tags: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    spec = f"open_clip:zoo-siglip/{TAG}"
    for folder in folders:
        folder.mkdir()
        write_open_clip(tuned(spec, tmp_path), spec, folder)
        spec = f"open_clip:local-dir:{folder}"
    first, second = (load_file(folder / "open_clip_model.safetensors") for folder in folders)
    changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], second[name])}
    assert (first.keys() == second.keys(), changed) == (True, {"visual"})
    for name in ("open_clip_config.json", "tokenizer.json"):
        assert (folders[0] / name).read_text() == (folders[1] / name).read_text()


def test_without_a_tokeniser_the_whole_model_is_written(
    tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import open_clip

    config = open_clip.factory._MODEL_CONFIGS["zoo-siglip"]
    monkeypatch.setitem(config["text_cfg"], "hf_tokenizer_name", str(tmp_path / "gone"))
    encoder = load_encoder(f"open_clip:zoo-siglip/{TAG}")
    (tmp_path / "out").mkdir()
    write_open_clip(encoder, encoder.spec, tmp_path / "out")
    assert f"the tokeniser {tmp_path / 'gone'} is not written" in capsys.readouterr().err
    assert load_encoder(f"open_clip:local-dir:{tmp_path / 'out'}").sha256 == encoder.sha256


def test_another_input_size_is_written_to_the_configuration(tags: Path, tmp_path: Path) -> None:
    encoder = load_encoder(f"open_clip:zoo-laion/{TAG},image_size=48")
    (tmp_path / "out").mkdir()
    write_open_clip(encoder, encoder.spec, tmp_path / "out")
    again = load_encoder(f"open_clip:local-dir:{tmp_path / 'out'}")
    assert (again.sha256, again.preprocessing) == (encoder.sha256, encoder.preprocessing)
    assert again.input_shape == (3, 48, 48)
    # Convolutions take any size; timm's position embeddings have that of timm's configuration.
    encoder = load_encoder(f"open_clip:zoo-convnext/{TAG},image_size=64")
    (tmp_path / "convnext").mkdir()
    write_open_clip(encoder, encoder.spec, tmp_path / "convnext")
    assert load_encoder(f"open_clip:local-dir:{tmp_path / 'convnext'}").input_shape == (3, 64, 64)
    encoder = load_encoder(f"open_clip:zoo-siglip/{TAG},image_size=96")
    with refused(ConfigError, "to", "open_clip", "test_vit3", 96, 160, "encoder.safetensors"):
        write_open_clip(encoder, encoder.spec, tmp_path / "siglip")
    assert not (tmp_path / "siglip").exists()


@pytest.mark.parametrize("name", ["zoo-clip-quickgelu", "zoo-laion", "zoo-siglip"])
def test_a_run_that_is_moved_and_exported_computes_the_same(
    make_artifact: MakeArtifact, tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Saved, moved, loaded, exported and loaded again, it gives photos the same embeddings."""
    start = load_encoder(f"open_clip:{name}/{TAG}")
    artifact = make_artifact(name="artifact", shape=start.input_shape, width=start.embedding_dim, encoder=start.spec)
    run, photos = tmp_path / "run", odd_photos()
    summary = train(TrainConfig(artifact=artifact, run=str(run), steps=2, batch_size=5, learning_rate=1e-3))
    encoder = load_encoder(summary.encoder)
    expected = embed(encoder, photos)
    assert encoder.preprocessing.mean == ZOO[name][1]["mean"]
    assert not torch.allclose(expected, embed(start, photos), rtol=1e-3)

    moved = tmp_path / "elsewhere" / "moved"
    shutil.move(run, moved)
    out = tmp_path / "out"
    export(str(moved), "open_clip", str(out))
    for spec in (f"open_clip:{name}/{TAG}@{moved / 'encoder.safetensors'}", f"open_clip:local-dir:{out}"):
        again = load_encoder(spec)
        assert (again.sha256, again.preprocessing) == (summary.encoder_sha256, encoder.preprocessing)
        torch.testing.assert_close(embed(again, photos), expected, rtol=0, atol=0)
    run_card(out, photos[0], monkeypatch, expected[:1])

    card = (out / "README.md").read_text()
    assert f"Pixels: {encoder.preprocessing}." in card
    assert f"The text tower is that of `open_clip:{name}/{TAG}`." in card
    if name == "zoo-siglip":
        with refused(ConfigError, "to", "TimmModel"):
            export(str(moved), "hf", str(tmp_path / "hf"))
        return
    export(str(moved), "hf", str(tmp_path / "hf"))
    named = load_encoder(f"open_clip:{name}/{TAG}@{tmp_path / 'hf/model.safetensors'}")
    assert (named.sha256, named.preprocessing) == (summary.encoder_sha256, encoder.preprocessing)
    again = load_encoder(f"hf:{tmp_path / 'hf'}")
    assert again.preprocessing == in_transformers(encoder)
    # For photos that transformers crops to the same square, embeddings are the same.
    same = [photo for photo in photos if _agree(photo, encoder.preprocessing, again.preprocessing)]
    assert len(same) >= 2
    torch.testing.assert_close(embed(again, same), embed(encoder, same), rtol=1e-4, atol=1e-5)
    run_card(tmp_path / "hf", same[0], monkeypatch, embed(encoder, same[:1]), 0.05)


def _with_preprocessing(encoder: Encoder, **changes: Any) -> Encoder:
    """The encoder with another preprocessing."""
    other = Preprocessing.model_validate({**encoder.preprocessing.model_dump(), **changes})
    return Encoder(encoder.model, encoder.spec, other, False)


def test_a_preprocessing_that_a_format_cannot_express_is_refused(tags: Path, tmp_path: Path) -> None:
    encoder = load_encoder(f"open_clip:zoo-laion/{TAG}")
    nowhere = tmp_path / "nowhere"
    for changes, fact in (
        ({"scale": (40, 40)}, "scale 40x40"),
        ({"offset": "down"}, "offset"),
        ({"interpolation": "lanczos"}, "lanczos"),
        ({"resize": "none"}, "none"),
    ):
        with refused(ConfigError, "to", "open_clip", fact, "encoder.safetensors"):
            write_open_clip(_with_preprocessing(encoder, **changes), encoder.spec, nowhere)
    for changes, fact in (
        ({"resize": "longest"}, "longest"),
        ({"scale": (30, 30)}, "30 x 30"),
        ({"scale": (40, 60)}, "40 x 60"),
        ({"rounding": "nearest"}, "nearest"),
    ):
        with refused(ConfigError, "to", "hf", fact, "encoder.safetensors"):
            write_hugging_face(_with_preprocessing(encoder, **changes), nowhere)
    timm = load_encoder("timm:test_resnet")
    with refused(ConfigError, "to", "timm", "images of this size"):
        write_timm(_with_preprocessing(timm, resize="none"), nowhere)
    assert not nowhere.exists()


@pytest.mark.parametrize(
    ("field", "value", "fact"),
    [
        ("mean", [0.48, 0.46, 0.41], "grey levels"),
        ("interpolation", "bilinear", "grey levels"),
        ("resize_mode", "squash", "grey levels"),
    ],
)
def test_a_library_that_makes_other_pixels_is_noticed(
    tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: Any, fact: str
) -> None:
    """For example because it interprets a field of the configuration differently."""
    import open_clip

    create = open_clip.create_model_and_transforms
    names = {"mean": "image_mean", "interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    monkeypatch.setattr(
        open_clip, "create_model_and_transforms", lambda name, **rest: create(name, **rest, **{names[field]: value})
    )
    encoder = tuned(f"open_clip:zoo-laion/{TAG}", tmp_path)
    (tmp_path / "out").mkdir()
    with refused(DatamergeError, None, fact):
        write_open_clip(encoder, f"open_clip:zoo-laion/{TAG}", tmp_path / "out")


def test_weights_that_change_while_they_are_written_are_noticed(
    tags: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(
            {name: tensor + 1e-3 if name == "visual.proj" else tensor for name, tensor in tensors.items()}, path
        )

    monkeypatch.setattr("trainer.export.open_clip_folder.save_file", damaged)
    encoder = tuned(f"open_clip:zoo-laion/{TAG}", tmp_path)
    (tmp_path / "out").mkdir()
    with refused(DatamergeError, None, "visual.pt"):
        write_open_clip(encoder, f"open_clip:zoo-laion/{TAG}", tmp_path / "out")


def _agree(photo: Image.Image, one: Preprocessing, other: Preprocessing) -> bool:
    return np.array_equal(decode(photo, one), decode(photo, other))
