"""Exports of models of transformers and timm, loaded again by their own library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from datamerge.encoders import load_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from datamerge.sources import decode
from storage_schemas import ConfigError
from tests.support.exports import embed, odd_photos, run_card, tuned
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.export.command import Target, export
from trainer.export.hugging_face_folder import write_hugging_face

MakeArtifact = Callable[..., str]
HUGGING_FACE: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIPVisionModelWithProjection": ("CLIPImageProcessor", {"image_mean": [0.5, 0.4, 0.3]}),
    "CLIPVisionModel": ("CLIPImageProcessor", {"size": {"shortest_edge": 40}}),
    "SiglipVisionModel": ("SiglipImageProcessor", {"size": {"height": 32, "width": 32}, "resample": 2}),
    "Dinov2WithRegistersModel": ("BitImageProcessor", {"size": {"shortest_edge": 37}}),
    "ViTModel": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}}),
}


def _save_hugging_face(name: str, folder: Path) -> str:
    """Spec of a small vision model of transformers with its image processor."""
    make_torchvision_importable()
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    options = {"image_size": 32, "patch_size": 8, **({"projection_dim": 24} if "Projection" in name else {})}
    configuration = getattr(transformers, name).config_class(**sizes, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        getattr(transformers, name)(configuration).save_pretrained(folder)
    processor, changes = HUGGING_FACE[name]
    cut = {"height": 32, "width": 32}
    getattr(transformers, processor)(**{"crop_size": cut, **changes}).save_pretrained(folder)
    return f"hf:{folder}"


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_an_exported_transformers_model_equals_the_tuned_one(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import transformers

    spec = _save_hugging_face(name, tmp_path / "start")
    encoder = tuned(spec, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    transformers.utils.logging.enable_progress_bar()
    capsys.readouterr()
    folder = write_hugging_face(encoder, out)
    assert "%|" not in capsys.readouterr().err, "progress bars of transformers"
    assert f"import AutoImageProcessor, {name}" in folder.usage
    assert folder.note == "", "there is nothing to note: the preprocessing is unchanged"
    again = load_encoder(f"hf:{out}")
    assert (again.sha256, again.preprocessing) == (encoder.sha256, encoder.preprocessing)
    # transformers' backend with Pillow resamples as we do.
    processor: Any = transformers.AutoImageProcessor.from_pretrained(out, backend="pil")
    photos = odd_photos()
    pixels = processor(photos, return_tensors="pt").pixel_values
    ours = torch.stack([torch.from_numpy(decode(photo, encoder.preprocessing)) for photo in photos]).float() / 255
    torch.testing.assert_close(pixels, (ours - encoder.mean) / encoder.std, rtol=0, atol=1e-5)
    model: Any = getattr(transformers, name).from_pretrained(out).eval()
    with torch.no_grad():
        output = model(pixel_values=pixels)
    found = {"CLIPVisionModelWithProjection": "image_embeds", "ViTModel": None}.get(name, "pooler_output")
    embeddings = output.last_hidden_state[:, 0] if found is None else output[found]
    torch.testing.assert_close(embeddings, embed(encoder, photos), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "options"), [("test_vit", {"tag": "r160_in1k"}), ("test_resnet", {"size": 96})])
def test_an_exported_timm_model_equals_the_tuned_one(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any]
) -> None:
    import timm

    save_file(timm.create_model(model, num_classes=0).state_dict(), tmp_path / "start.safetensors")
    size = f",image_size={options['size']}" if "size" in options else ""
    tag = f"/{options['tag']}" if "tag" in options else ""
    start = load_encoder(f"timm:{model}{tag}{size}@{tmp_path / 'start.safetensors'}")
    artifact = make_artifact(name="artifact", shape=start.input_shape, width=start.embedding_dim, encoder=start.spec)
    run, out, photos = tmp_path / "run", tmp_path / "out", odd_photos()
    summary = train(TrainConfig(artifact=artifact, run=str(run), steps=1, batch_size=5, learning_rate=1e-3))
    export(str(run), "timm", str(out))
    encoder, again = load_encoder(summary.encoder), load_encoder(f"timm:local-dir:{out}")
    assert (again.sha256, again.preprocessing) == (encoder.sha256, encoder.preprocessing)
    torch.testing.assert_close(embed(again, photos), embed(encoder, photos))
    run_card(out, photos[0], monkeypatch, embed(encoder, photos[:1]))
    others: tuple[Target, ...] = ("open_clip", "hf")
    for target in others:
        with refused(ConfigError, "to", target, f"timm:{model}", '`to="timm"`'):
            export(str(run), target, str(tmp_path / "no"))
