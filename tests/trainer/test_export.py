"""Exported encoders, loaded by the stock libraries: the same embeddings as the run's encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from datamerge.encoders import Encoder, load_encoder, save_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.artifacts import same_groups
from tests.support.refusals import refused
from trainer import RunSummary, TrainConfig, train
from trainer.export.command import Target, export, export_encoder
from trainer.export.hf_clip import clip_config

MakeArtifact = Callable[..., str]
# The architecture of ViT-B/32, B/16 and L/14, which differ only in these numbers and the activation.
TOWER = {"image_size": 32, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
MODELS: dict[str, dict[str, Any]] = {
    "tiny-gelu": {},
    "tiny-quickgelu": {"quick_gelu": True},
    "tiny-average": {"vision": {"pool_type": "avg"}},
}


@pytest.fixture(scope="module", autouse=True)
def _tiny_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    make_torchvision_importable()
    import open_clip

    folder = tmp_path_factory.mktemp("configs")
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    for name, options in MODELS.items():
        config = {"embed_dim": 24, "text_cfg": text, "vision_cfg": {**TOWER, **options.get("vision", {})}}
        config |= {"quick_gelu": True} if options.get("quick_gelu") else {}
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def _run(make_artifact: MakeArtifact, folder: Path, model: str, **settings: Any) -> RunSummary:
    """A finished run whose weights are far from their initial zeros and ones, so that a swapped name shows."""
    encoder = load_encoder(f"open_clip:{model}")
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    weights = folder.parent / f"{model}.safetensors"
    save_encoder(encoder, weights)
    artifact = make_artifact(
        name=f"artifact-{model}", shape=(3, 32, 32), width=24, encoder=f"open_clip:{model}@{weights}"
    )
    if "eval_artifact" in settings:
        settings["eval_artifact"] = same_groups(artifact)
    config = TrainConfig(artifact=artifact, run=str(folder), steps=4, batch_size=5, learning_rate=1e-3, **settings)
    return train(config)


def _pixels(encoder: Encoder) -> Tensor:
    return torch.rand((3, *encoder.input_shape), generator=torch.Generator().manual_seed(5))


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


@pytest.mark.parametrize("model", ["tiny-gelu", "tiny-quickgelu"])
def test_both_exports_give_the_runs_embeddings(make_artifact: MakeArtifact, tmp_path: Path, model: str) -> None:
    import open_clip
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    summary = _run(make_artifact, tmp_path / "run", model)
    encoder = load_encoder(summary.encoder)
    pixels = _pixels(encoder)
    with torch.no_grad():
        expected = encoder(pixels)

    result = CliRunner().invoke(
        export_encoder, [str(tmp_path / "run"), "--to", "open_clip", "-o", str(tmp_path / "a/visual")]
    )
    assert result.exit_code == 0, result.output
    stock = open_clip.create_model(model)
    stock.visual.load_state_dict(torch.load(tmp_path / "a/visual/visual.pt", weights_only=True))
    with torch.no_grad():
        assert _difference(stock.eval().encode_image((pixels - encoder.mean) / encoder.std), expected) < 1e-5
    assert load_encoder(f"open_clip:{model}@{tmp_path / 'a/visual/visual.pt'}").sha256 == summary.encoder_sha256

    result = CliRunner().invoke(export_encoder, [str(tmp_path / "run"), "--to", "hf", "-o", str(tmp_path / "hf")])
    assert result.exit_code == 0, result.output
    hugging_face: Any = CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf")
    hugging_face.eval()
    processor: Any = CLIPImageProcessor.from_pretrained(tmp_path / "hf")
    image = (np.random.default_rng(0).integers(0, 256, (32, 32, 3))).astype(np.uint8)
    with torch.no_grad():
        found = hugging_face(pixel_values=(pixels - encoder.mean) / encoder.std).image_embeds
        assert _difference(found, expected) < 1e-5
        # The processor makes the encoder's pixels from an image of the right size.
        processed = hugging_face(**processor([image], return_tensors="pt")).image_embeds
        direct = encoder(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    torch.testing.assert_close(processed, direct, rtol=0, atol=1e-4)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    card = (tmp_path / "hf/README.md").read_text()
    for fact in (summary.arm, summary.plan_sha256, summary.encoder_sha256, summary.original, str(summary.steps)):
        assert fact in card


def test_the_best_state_is_exported_on_request(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    summary = _run(make_artifact, tmp_path / "run", "tiny-gelu", eval_artifact="", eval_every=1, ema=0.5)
    export(str(tmp_path / "run"), "open_clip", str(tmp_path / "best"), best=True)
    state = torch.load(tmp_path / "run/checkpoints/best.pt", weights_only=True)
    exported = torch.load(tmp_path / "best/visual.pt", weights_only=True)
    for name, tensor in exported.items():
        assert torch.equal(tensor, state["average"][f"module.model.{name}"])
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert state["best"] == min(line["eval_loss"] for line in lines)
    assert lines[state["step"] - 1]["eval_loss"] == state["best"]
    assert "lowest held-out loss" in (tmp_path / "best/README.md").read_text()
    assert summary.steps == 4


def test_unsupported_exports_are_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    _run(make_artifact, tmp_path / "average", "tiny-average")
    train(TrainConfig(artifact=make_artifact(), run=str(tmp_path / "mlp"), steps=1))
    cases: list[tuple[str, Target, bool, str | None, list[str]]] = [
        ("average", "hf", False, "to", ["hf", "avg"]),
        ("mlp", "hf", False, "to", ["hf", "mlp:", "encoder.safetensors"]),
        ("mlp", "open_clip", False, "to", ["open_clip", "mlp:"]),
        ("mlp", "open_clip", True, "best", ["best.pt", "`eval_artifact`"]),
        ("nowhere", "hf", False, "run", ["nowhere", "run.json"]),
    ]
    for run, to, best, field, facts in cases:
        with refused(ConfigError, field, *facts):
            export(str(tmp_path / run), to, out, best=best)
    assert not Path(out).exists()
    Path(out).mkdir()
    with refused(ConfigError, "output", out):
        export(str(tmp_path / "average"), "open_clip", out)


def test_damaged_weights_are_not_exported(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    _run(make_artifact, tmp_path / "run", "tiny-gelu")
    file = tmp_path / "run/encoder.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with refused(DatamergeError, None, tmp_path / "run", "weights", "run.json"):
        export(str(tmp_path / "run"), "open_clip", str(tmp_path / "out"))


@pytest.mark.parametrize("model", ["ViT-B-32-quickgelu", "ViT-B-16"])
def test_published_architectures_map_to_transformers(model: str) -> None:
    """Configurations only: networks of this size take seconds to build, and every `export` compares embeddings."""
    import open_clip

    config = open_clip.get_model_config(model)
    assert config is not None
    tower = config["vision_cfg"]
    small = {"vision_cfg": {**tower, "layers": 1}, "text_cfg": {**config["text_cfg"], "layers": 1, "vocab_size": 16}}
    visual = open_clip.CLIP(config["embed_dim"], **small, quick_gelu=config.get("quick_gelu", False)).visual
    encoder = Encoder(visual, f"open_clip:{model}", Preprocessing(shape=(3, 224, 224), mean=(0.5,), std=(0.5,)), True)
    found = clip_config(encoder)
    assert found["patch_size"] == tower["patch_size"]
    assert found["hidden_act"] == ("quick_gelu" if "quickgelu" in model else "gelu")
    assert (found["hidden_size"], found["projection_dim"]) == (tower["width"], config["embed_dim"])
