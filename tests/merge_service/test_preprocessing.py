"""Merge, train and evaluate with an encoder whose preprocessing is not CLIP's, against open_clip's own pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation import EvaluateConfig, evaluate
from datamerge.evaluation.config import EmbeddingConfig
from datamerge.evaluation.embedding import evaluate_embedding
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from merge_service import MergeConfig
from merge_service.cli import merge as merge_command
from merge_service.merge import prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import Artifact, ArtifactWriter, ConfigError, Location, open_artifact
from storage_schemas.operations.remerge import Remerge, remerge
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.merging import merge_alone
from tests.support.refusals import refused
from trainer import TrainConfig, train

SIZE, HALF = 32, (0.5, 0.5, 0.5)
MODEL = {
    "embed_dim": 6,
    "vision_cfg": {"image_size": SIZE, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 8, "heads": 1, "layers": 1},
}
SQUASHED = {"mean": HALF, "std": HALF, "resize_mode": "squash", "interpolation": "bicubic"}
SIZES = ((47, 61), (33, 32), (35, 80), (32, 32), (20, 15), (90, 41))


@dataclass(frozen=True)
class Tuned:
    """An artifact, a run trained on it, and open_clip's model and transform of their encoder."""

    photos: Path
    spec: str
    artifact: Path
    run: Path
    model: Any
    transform: Callable[[Image.Image], torch.Tensor]

    def pictures(self) -> list[torch.Tensor]:
        """Normalised pixels of the photos, by open_clip's transform."""
        files = sorted(self.photos.iterdir())
        return [self.transform(Image.open(file)) for file in files]


def _write_clip_folder(path: Path, preprocessing: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> Any:
    """Write a folder as open_clip publishes one; return open_clip's model and transform of it."""
    make_torchvision_importable()
    import open_clip

    path.mkdir()
    config = {"model_cfg": MODEL, "preprocess_cfg": dict(preprocessing)}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    if weights is None:
        torch.manual_seed(3)
        config_vision = {"embed_dim": 6, "vision_cfg": MODEL["vision_cfg"], "text_cfg": MODEL["text_cfg"]}
        weights = open_clip.CLIP(**config_vision).state_dict()
    save_file({name: value.contiguous() for name, value in weights.items()}, path / "open_clip_model.safetensors")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    return model.eval(), transform


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("squashed")
    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 256, (7, 9, 3)).astype(np.uint8))
        small.resize((width, height)).save(photos / f"{number}.png")
    model, transform = _write_clip_folder(folder / "clip", SQUASHED)
    spec = f"open_clip:local-dir:{folder / 'clip'}"
    merge_alone(photos, folder / "artifact", encoder=spec, keep_clean=True, keep_members=True)
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "learning_rate": 1e-3, "device": "cpu"}
    train(TrainConfig(artifact=str(folder / "artifact"), run=str(folder / "run"), **settings))
    return Tuned(photos, spec, folder / "artifact", folder / "run", model, transform)


def test_clean_images_and_targets_equal_those_of_open_clip(tuned: Tuned) -> None:
    records = {record.samples[0]: record for record in open_artifact(tuned.artifact)}
    assert len(records) == len(SIZES)
    for number, picture in enumerate(tuned.pictures()):
        record = records[f"{number}.png"]
        np.testing.assert_array_equal(record.arrays["clean"], ((picture * 0.5 + 0.5) * 255).round().numpy())
        with torch.no_grad():
            expected = tuned.model.encode_image(picture[None])[0]
        assert record.target is not None
        np.testing.assert_allclose(record.target, expected, atol=1e-6)


def test_preprocessing_is_recorded_and_described_in_one_line(tuned: Tuned, tmp_path: Path) -> None:
    expected = Preprocessing(shape=(3, SIZE, SIZE), resize="squash", mean=HALF, std=HALF)
    artifact = open_artifact(tuned.artifact)
    assert artifact.manifest.provenance["preprocessing"] == expected.record()
    assert load_encoder(f"{tuned.spec}@{tuned.run / 'encoder.safetensors'}").preprocessing == expected
    smaller = remerge(artifact, Location(tmp_path / "smaller"), Remerge(members=1))
    assert smaller.provenance["preprocessing"] == expected.record()
    for file in ("README.md", "croissant.json"):
        text = (tmp_path / "smaller" / file).read_text("utf-8")
        assert "3x32x32: squashed to 32x32, bicubic, mean 0.5, std 0.5" in text


def test_a_dry_run_describes_the_preprocessing(tuned: Tuned, tmp_path: Path) -> None:
    flags = ["--encoder", tuned.spec, "--members", "2", "--steps", "1", "--device", "cpu", "--dry-run"]
    shown = CliRunner().invoke(merge_command, [str(tuned.photos), str(tmp_path / "none"), *flags])
    assert shown.exit_code == 0, shown.output
    assert "pixels: 3x32x32: squashed to 32x32, bicubic, mean 0.5, std 0.5" in shown.output


def test_embedding_losses_equal_those_of_open_clips_pixels(tuned: Tuned) -> None:
    """The table also has an encoder whose pixels have another size and normalisation."""
    other = "mlp:1x6x5-8-4"
    settings: dict[str, Any] = {"data": str(tuned.photos), "device": "cpu", "steps": 1, "epsilon": "1/255"}
    of_run, of_other = evaluate(EvaluateConfig(runs=[str(tuned.run), other], **settings))
    assert of_run.score("loss clean").count == of_other.score("loss clean").count == len(SIZES)
    assert of_other.score("loss clean").value == 0
    weights = load_encoder(f"{tuned.spec}@{tuned.run / 'encoder.safetensors'}").model
    with torch.no_grad():
        losses = [
            (weights(picture[None]) - tuned.model.encode_image(picture[None])).square().sum().item()
            for picture in tuned.pictures()
        ]
    assert of_run.score("loss clean").value == pytest.approx(np.mean(losses), rel=1e-4)
    assert of_run.score("loss clean").value > 1e-4


def _train(tuned: Tuned, run: Path, **settings: Any) -> None:
    shared: dict[str, Any] = {"artifact": str(tuned.artifact), "steps": 1, "device": "cpu"}
    train(TrainConfig(**{**shared, "run": str(run), **settings}))


def _copy_with_preprocessing(artifact: Artifact, path: Path, preprocessing: Any) -> str:
    """Copy an artifact with another preprocessing in its provenance; return the path."""
    provenance = {**artifact.manifest.provenance, "preprocessing": preprocessing}
    writer = ArtifactWriter(Location(path), artifact.manifest.layout, provenance)
    writer.begin({})
    for shard in range(artifact.manifest.layout.shards):
        count = len(artifact.commit(shard).records)
        writer.commit(shard, [artifact.read(shard, offset) for offset in range(count)], [])
    writer.finish()
    return str(path)


@pytest.mark.parametrize(
    ("changed", "facts"),
    [
        ({"mean": (0.48, 0.46, 0.41)}, ("mean (0.48, 0.46, 0.41), not 0.5",)),
        ({"std": (0.25, 0.25, 0.25)}, ("std 0.25, not 0.5",)),
        (
            {"resize_mode": "shortest", "interpolation": "bilinear"},
            ("resize shortest, not squash", "interpolation bilinear, not bicubic"),
        ),
    ],
)
def test_another_preprocessing_is_refused(
    tuned: Tuned, tmp_path: Path, changed: dict[str, Any], facts: tuple[str, ...]
) -> None:
    """Training refuses any difference; merging and evaluating accept another normalisation, but no other resizing."""
    _write_clip_folder(tmp_path / "other", {**SQUASHED, **changed}, tuned.model.state_dict())
    other = f"open_clip:local-dir:{tmp_path / 'other'}"
    with refused(ConfigError, "encoder", str(tuned.artifact), other, *facts):
        _train(tuned, tmp_path / "run", encoder=other)
    merging = {"encoder": tuned.spec, "target_encoder": other}
    evaluating = EmbeddingConfig(
        runs=[tuned.spec], original=other, data=str(tuned.photos), steps=1, output=str(tmp_path / "out")
    )
    if "resize_mode" not in changed:
        artifact = merge_alone(tuned.photos, tmp_path / "artifact", **merging)
        assert artifact.manifest.provenance["preprocessing"] == load_encoder(other).preprocessing.record()
        (result,) = evaluate_embedding(evaluating)
        assert result.images == len(SIZES)
    else:
        with refused(ConfigError, "target_encoder", *facts):
            merge_alone(tuned.photos, tmp_path / "artifact", **merging)
        with refused(ConfigError, "runs", tuned.spec, other, "resize squash, not shortest"):
            evaluate_embedding(evaluating)


def test_changed_weights_in_the_folder_of_an_artifacts_encoder_are_refused(tuned: Tuned, tmp_path: Path) -> None:
    """The folder may hold another model by now; naming it as `encoder` accepts it."""
    _write_clip_folder(tmp_path / "clip", SQUASHED, tuned.model.state_dict())
    spec = f"open_clip:local-dir:{tmp_path / 'clip'}"
    merge_alone(tuned.photos, tmp_path / "artifact", encoder=spec)
    changed = {name: 2 * value for name, value in tuned.model.state_dict().items()}
    save_file(changed, tmp_path / "clip" / "open_clip_model.safetensors")
    with refused(ConfigError, "encoder", spec, tmp_path / "artifact"):
        _train(tuned, tmp_path / "run", artifact=str(tmp_path / "artifact"))
    _train(tuned, tmp_path / "run-2", artifact=str(tmp_path / "artifact"), encoder=spec)


def test_held_out_artifacts_with_another_preprocessing_are_refused(tuned: Tuned, tmp_path: Path) -> None:
    artifact = open_artifact(tuned.artifact)
    record: Any = artifact.manifest.provenance["preprocessing"]
    other = _copy_with_preprocessing(artifact, tmp_path / "other", {**record, "mean": [0.1, 0.2, 0.3]})
    with refused(ConfigError, "encoder", other, "mean 0.5, not (0.1, 0.2, 0.3)"):
        _train(tuned, tmp_path / "run", eval_artifact=other)


def test_artifacts_of_earlier_releases_are_trained_on_with_a_warning(
    tuned: Tuned, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their provenance says that the shorter side was resized, even if the encoder squashes."""
    earlier = {"shape": [3, SIZE, SIZE], "resize": "bicubic, shorter side", "crop": "centre"}
    path = _copy_with_preprocessing(open_artifact(tuned.artifact), tmp_path / "earlier", earlier)
    _train(tuned, tmp_path / "run", artifact=path, encoder=tuned.spec)
    assert "resize squash, not shortest" in capsys.readouterr().err
    unknown = {**earlier, "resize": "by hand"}
    path = _copy_with_preprocessing(open_artifact(tuned.artifact), tmp_path / "unknown", unknown)
    with refused(ConfigError, None, path, "preprocessing.resize"):
        _train(tuned, tmp_path / "run-2", artifact=path, encoder=tuned.spec)


def test_label_groups_can_use_the_preprocessing_of_an_encoder(tuned: Tuned, tmp_path: Path) -> None:
    folder = tmp_path / "classes" / "one"
    folder.mkdir(parents=True)
    for file in tuned.photos.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    labels = {"grouping": "label", "members": 1, "keep_members": True}
    artifact = merge_alone(tmp_path / "classes", tmp_path / "artifact", **labels, preprocessing_of=str(tuned.run))
    provenance: Any = artifact.manifest.provenance
    assert "encoder" not in provenance
    assert provenance["preprocessing"] == open_artifact(tuned.artifact).manifest.provenance["preprocessing"]
    members = {record.samples[0]: record.arrays["members"][0] for record in artifact}
    for number, picture in enumerate(tuned.pictures()):
        expected = ((picture * 0.5 + 0.5) * 255).round().numpy()
        np.testing.assert_array_equal(members[f"one/{number}.png"], expected)
    for wrong in ({"preprocessing_of": "mlp:nonsense"}, {"preprocessing_of": tuned.spec, "shape": "1x6x5"}):
        with refused(ConfigError, "preprocessing_of"):
            merge_alone(tmp_path / "classes", tmp_path / "none", **labels, **wrong)


def test_a_worker_with_another_preprocessing_stops(tuned: Tuned, tmp_path: Path) -> None:
    """Its machine has the same weights under the same name, saved with another preprocessing."""
    weights = tmp_path / "weights.safetensors"
    encoder = load_encoder("mlp:1x6x5-8-4")
    save_encoder(encoder, weights)
    spec = f"mlp:1x6x5-8-4@{weights}"
    config = MergeConfig.model_validate(
        {"source": str(tuned.photos), "artifact": str(tmp_path / "a"), "encoder": spec, "device": "cpu"}
    )
    prepared = prepare(config)
    writer = ArtifactWriter(Location(tmp_path / "a"), prepared.plan.layout, prepared.plan.provenance)
    encoder.preprocessing = encoder.preprocessing.model_copy(update={"resize": "squash"})
    save_encoder(encoder, weights)
    with refused(ConfigError, "encoder", spec, "resize squash, not shortest"):
        ShardWorker(worker_setup(prepared, writer, "cpu")).prepare()


def test_image_size_becomes_part_of_the_encoder(tuned: Tuned, tmp_path: Path) -> None:
    artifact = merge_alone(tuned.photos, tmp_path / "artifact", encoder=tuned.spec, image_size=48)
    provenance: Any = artifact.manifest.provenance
    assert provenance["preprocessing"]["shape"] == [3, 48, 48]
    assert provenance["encoder"]["spec"] == f"{tuned.spec},image_size=48"
    assert artifact.manifest.layout.pixels == (3, 48, 48)
    # The artifact's own encoder has its size; another one is given it.
    _train(tuned, tmp_path / "run", artifact=str(artifact.location.root))
    _train(tuned, tmp_path / "run-2", artifact=str(artifact.location.root), encoder=tuned.spec, image_size=48)
    specs = [json.loads((tmp_path / name / "run.json").read_text())["original"] for name in ("run", "run-2")]
    assert specs == [f"{tuned.spec},image_size=48"] * 2
    with refused(ConfigError, "encoder", "(3, 32, 32)", "(3, 48, 48)"):
        _train(tuned, tmp_path / "run-3", artifact=str(artifact.location.root), encoder=tuned.spec)
    settings: dict[str, Any] = {"data": str(tuned.photos), "device": "cpu", "steps": 1, "image_size": 48}
    (result,) = evaluate_embedding(EmbeddingConfig(runs=[tuned.spec], output=str(tmp_path / "out"), **settings))
    assert result.encoder == f"{tuned.spec},image_size=48"
    with refused(ConfigError, "image_size", str(tuned.run)):
        evaluate_embedding(EmbeddingConfig(runs=[str(tuned.run)], output=str(tmp_path / "out-2"), **settings))
    with refused(ConfigError, "image_size", str(tuned.run), 48):
        merge_alone(tuned.photos, tmp_path / "none", encoder=str(tuned.run), image_size=48)
    with refused(ConfigError, "image_size", "`encoder`"):
        _train(tuned, tmp_path / "none", image_size=48)
    with refused(ConfigError, "image_size", "`shape`"):
        merge_alone(tuned.photos, tmp_path / "none", grouping="label", image_size=48)
