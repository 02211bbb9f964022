"""Zero-shot accuracy and embedding loss: values worked out by hand, subsets, resuming, the report."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation.config import EmbeddingConfig, ZeroShotConfig
from datamerge.evaluation.embedding import evaluate_embedding
from datamerge.evaluation.reports import write_reports
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import ArmFolder
from datamerge.evaluation.study import open_sample
from datamerge.evaluation.zero_shot import evaluate_zero_shot, read_templates
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, DatamergeError
from tests.support.refusals import refused
from tests.support.small_hugging_face import small_hugging_face

MakeEncoder = Callable[[list[list[float]]], str]
MakeHead = Callable[..., str]


def measure(run: str, data: Path, output: Path, **flags: Any) -> ArmResult:
    values = {"runs": [run], "data": str(data), "output": str(output), "steps": 10, **flags}
    (result,) = evaluate_zero_shot(load_settings(ZeroShotConfig, None, values))
    return result


def embedding(run: str, data: Path, output: Path, **flags: Any) -> ArmResult:
    values = {"runs": [run], "data": str(data), "output": str(output), "steps": 10, **flags}
    (result,) = evaluate_embedding(load_settings(EmbeddingConfig, None, values))
    return result


def scores(result: ArmResult) -> dict[str, float]:
    return {score.name: score.value for score in result.scores}


@pytest.fixture
def textures(tmp_path: Path) -> Path:
    folder = tmp_path / "textures"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(7):
        Image.fromarray(rng.integers(40, 210, (2, 2), np.uint8)).save(folder / f"{index}.png")
    return folder


@pytest.mark.parametrize("attack", ["apgd", "autoattack"])
def test_accuracy_of_a_linear_classifier_at_several_radii(
    two_class: str, photos: Path, make_head: MakeHead, tmp_path: Path, attack: str
) -> None:
    head = make_head([[1.0, 0.0], [0.0, 1.0]])
    radii = ["8/255", "1/255", "2/255"]
    result = measure(two_class, photos, tmp_path / "out", head=head, epsilons=radii, attack=attack)
    # Images are 1.5 or 7.5 levels from the boundary.
    assert scores(result) == {
        "top-1 clean": 100,
        "top-5 clean": 100,
        "top-1 ε=1/255": 100,
        "top-1 ε=2/255": 50,
        "top-1 ε=8/255": 0,
    }
    half = result.scores[3]
    assert half.error == pytest.approx(25)
    # Wilson's interval of 2 of 4.
    assert (half.low, half.high) == pytest.approx((15.00, 85.00), abs=0.01)


def test_accuracy_in_the_euclidean_ball(two_class: str, photos: Path, tmp_path: Path) -> None:
    # The gradient is 1/2 per pixel: moving all four by d costs 2d, so the margins are 3 and 15 levels.
    result = measure(
        two_class, photos, tmp_path, head="outputs", norm="l2", epsilons=["2.9/255", "3.1/255", "15.1/255"]
    )
    assert list(scores(result).values())[2:] == [100, 50, 0]


def test_folders_parquet_and_tars_have_the_same_scores(two_class: str, photos: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted(photos.rglob("*.png"))
    labels = [int(file.parent.name == "light") for file in files]
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    pq.write_table(pa.table({"image": rows, "label": labels}), tmp_path / "photos.parquet")
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "000000.tar", "w") as tar:
        for index, (file, label) in enumerate(zip(files, labels, strict=True)):
            for name, data in ((f"{index}.png", file.read_bytes()), (f"{index}.cls", str(label).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    found = [
        scores(measure(two_class, data, tmp_path / f"out-{data.name}", head="outputs", epsilons=["2/255"]))
        for data in (photos, tmp_path / "photos.parquet", tmp_path / "tars")
    ]
    assert found[0]["top-1 ε=2/255"] == 50
    assert found[1] == found[2] == found[0]


def test_top_5_counts_labels_among_the_best_five(make_encoder: MakeEncoder, photos: Path, tmp_path: Path) -> None:
    # Class 0 (dark) is always fifth of six, class 1 (light) last.
    spec = make_encoder([[0.0] * 4] * 6)
    encoder = load_encoder(spec)
    network: Any = encoder.model
    network[1].bias.data = torch.tensor([-3.0, -4.0, 2.0, 1.0, 0.0, -1.0])
    save_encoder(encoder, tmp_path / "six.safetensors")
    result = measure(f"mlp:1x2x2-6@{tmp_path / 'six.safetensors'}", photos, tmp_path / "out", head="outputs")
    assert scores(result)["top-1 clean"] == 0
    assert scores(result)["top-5 clean"] == 50


def test_embedding_losses_equal_the_closed_form(make_encoder: MakeEncoder, textures: Path, tmp_path: Path) -> None:
    weight = np.array([0.5, -1.0, 2.0, 0.25])
    spec = make_encoder([weight.tolist()])
    result = embedding(spec, textures, tmp_path / "linf", epsilons=["4/255", "2/255"])
    assert list(scores(result)) == ["embedding loss clean", "embedding loss ε=2/255", "embedding loss ε=4/255"]
    # f(x + δ) − f(x) = 2 w·δ, at most 2ε‖w‖₁, for every image; in the ℓ2 ball at most 2ε‖w‖₂.
    expected = [(2 * epsilon / 255 * np.abs(weight).sum()) ** 2 for epsilon in (0, 2, 4)]
    assert list(scores(result).values()) == pytest.approx(expected, rel=1e-4)
    result = embedding(spec, textures, tmp_path / "l2", norm="l2", epsilons=["0.1"])
    assert scores(result)["embedding loss ε=0.1"] == pytest.approx(0.04 * (weight**2).sum(), rel=1e-3)


def test_the_seed_chooses_a_random_subset(make_encoder: MakeEncoder, textures: Path, tmp_path: Path) -> None:
    values = {"runs": [make_encoder([[1.0] * 4])], "data": str(textures), "sample": 4}
    source = open_sample(load_settings(EmbeddingConfig, None, values))
    np.random.seed(42)
    expected = [f"{index}.png" for index in np.random.choice(7, 4, replace=False)]
    assert [sample.name for sample in source.samples] == expected
    with refused(ConfigError, "sample", " 7 ", 8):
        open_sample(load_settings(EmbeddingConfig, None, {**values, "sample": 8}))


def test_an_interrupted_evaluation_is_resumed(
    make_encoder: MakeEncoder, textures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_encoder(np.random.default_rng(0).normal(size=(3, 4)).tolist())
    whole = embedding(spec, textures, tmp_path / "whole", batch_size=2)
    batches, write = 0, ArmFolder.write

    def interrupted(self: ArmFolder, *arguments: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 3:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(ArmFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedding(spec, textures, tmp_path / "parts", batch_size=2)
    batches = 10
    parts = embedding(spec, textures, tmp_path / "parts", batch_size=2)
    assert batches == 12, "two of four batches were left"
    assert parts.scores == whole.scores
    with refused(ConfigError, "output", "(steps: 10 ", ", 11 "):
        embedding(spec, textures, tmp_path / "parts", batch_size=2, steps=11)


def test_text_features_are_computed_once(
    make_clip: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, names = tmp_path / "data", tmp_path / "names.txt"
    for index, name in enumerate(("cat", "red bus")):
        (data / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (200 * index, 90, 30)).save(data / name / "a.png")
    names.write_text("red bus\ntree\ncat\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\na {}\n")
    flags = {"class_names": str(names), "templates": str(tmp_path / "prompts.txt"), "epsilons": ["1/255"], "steps": 2}
    monkeypatch.setenv("DATAMERGE_CACHE", str(tmp_path / "cache"))
    import open_clip

    calls = 0
    original = open_clip.build_zero_shot_classifier

    def counted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*arguments)

    monkeypatch.setattr(open_clip, "build_zero_shot_classifier", counted)
    first = measure(make_clip(), data, tmp_path / "out", **flags)
    again = measure(make_clip(), data, tmp_path / "out", **flags)
    elsewhere = measure(make_clip(), data, tmp_path / "other", **flags)
    assert calls == 1
    assert first.scores == again.scores == elsewhere.scores
    assert first.images == 2
    kept = {file.name for file in (tmp_path / "out" / "heads").iterdir()}
    assert len(kept) == 1
    assert {file.name for file in (tmp_path / "cache" / "heads").iterdir()} == kept
    # By hand: open_clip's text tower.
    name = make_clip().removeprefix("open_clip:")
    from datamerge.encoders.building import seeded

    with seeded():
        model = open_clip.create_model(name)
    tokenizer = open_clip.get_tokenizer(name)
    rows = []
    with torch.no_grad():
        for label in ("red bus", "tree", "cat"):
            texts = model.encode_text(tokenizer([f"a photo of a {label}.", f"a {label}"]), normalize=True).mean(dim=0)
            rows.append(texts / texts.norm())
        right = 0
        for folder, row in (("cat", 2), ("red bus", 0)):
            pixels = torch.from_numpy(np.array(Image.open(data / folder / "a.png"))).permute(2, 0, 1)[None] / 255
            embedded = load_encoder(make_clip())(pixels)[0]
            right += int(int((torch.stack(rows) @ embedded).argmax()) == row)
    assert scores(first)["top-1 clean"] == 50 * right


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_a_run_of_a_model_of_transformers_is_classified_by_its_text_tower(
    family: str, make_run: Callable[..., str], tmp_path: Path
) -> None:
    """The scores equal those of transformers' pipeline."""
    model = small_hugging_face(family, tmp_path / "model")
    encoder = load_encoder(f"hf:{tmp_path}/model")
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    run = make_run(f"{encoder.spec}@{tmp_path}/encoder.safetensors", encoder.spec)
    rng = np.random.default_rng(3)
    photos = {name: rng.integers(0, 256, (40, 50, 3)).astype(np.uint8) for name in ("cat", "red bus", "tree")}
    for name, pixels in photos.items():
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "data" / name / "a.png")
    (tmp_path / "names.txt").write_text("cat\nred bus\ntree\n")
    (tmp_path / "prompts.txt").write_text("a photo of a {}.\n")
    flags = {"class_names": str(tmp_path / "names.txt"), "templates": str(tmp_path / "prompts.txt"), "steps": 2}
    result = measure(run, tmp_path / "data", tmp_path / "out", epsilons=["1/255"], **flags)
    import transformers

    pipeline = transformers.pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(tmp_path / "model"),
        image_processor=transformers.AutoImageProcessor.from_pretrained(tmp_path / "model"),
    )
    best = {
        name: pipeline(Image.fromarray(pixels), list(photos), hypothesis_template="a photo of a {}.")[0]["label"]
        for name, pixels in photos.items()
    }
    assert scores(result)["top-1 clean"] == pytest.approx(100 * sum(map(str.__eq__, best, best.values())) / 3)
    assert result.details["head"] == encoder.spec


def test_imagenets_names_and_templates_are_read(tmp_path: Path) -> None:
    from datamerge.encoders.classes import imagenet_names

    assert len(imagenet_names()) == 1000
    assert imagenet_names()[0] == "tench"
    assert len(read_templates("simple")) == 7
    assert read_templates("openai") == []
    (tmp_path / "t.txt").write_text("a photo\n")
    with refused(ConfigError, "templates", tmp_path / "t.txt", "'a photo'"):
        read_templates(str(tmp_path / "t.txt"))
    with refused(ConfigError, "templates", tmp_path / "none.txt"):
        read_templates(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("flags", "field", "fact"),
    [
        ({"epsilons": ["2"]}, "epsilons", "2/255"),
        ({"epsilons": ["0"]}, "epsilons", " 0"),
        ({"epsilons": ["x"]}, "epsilons", "'x'"),
        ({"epsilons": ["2/0"]}, "epsilons", "'2/0'"),
        ({"epsilons": ["2 5/255"]}, "epsilons", "'2 5/255'"),
        ({"epsilons": ["1" * 400], "norm": "l2"}, "epsilons", "1111…"),
        ({"head": None}, "head", "open_clip"),
        ({"head": "open_clip:ViT-B-32"}, "class_names", "open_clip:ViT-B-32"),
        ({"steps": 0}, "steps", " 0"),
        ({"data": ""}, "data", "''"),
    ],
)
def test_wrong_settings_are_refused(
    two_class: str, photos: Path, tmp_path: Path, flags: dict[str, Any], field: str, fact: str
) -> None:
    values = {"data": str(photos), "output": str(tmp_path / "out"), "head": "outputs", **flags}
    with refused(ConfigError, field, fact):
        evaluate_zero_shot(load_settings(ZeroShotConfig, None, {"runs": [two_class], **values}))
    assert not (tmp_path / "out").exists()


def test_unlabelled_images_are_refused(two_class: str, photos: Path, tmp_path: Path) -> None:
    for name in ("dark", "light"):
        for place, file in enumerate((photos / name).iterdir()):
            shutil.move(file, photos / f"{name}-{place}.png")
    with refused(ConfigError, "data", "labels"):
        measure(two_class, photos, tmp_path / "out", head="outputs")


def test_commands_share_one_report(
    two_class: str, photos: Path, tmp_path: Path, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["-o", str(tmp_path / "out")]
    data = ["--data", str(photos), "--steps", "3", *output]
    arguments = [two_class, *data, "--head", "outputs", "--epsilons", "1/255,2/255"]
    assert run_command("zero-shot", *arguments) == 0
    assert run_command("embedding", two_class, *data, "--epsilons", "2/255") == 0
    out = capsys.readouterr().out
    assert "top-1 ε=2/255" in out
    assert "embedding loss clean" in out
    (entry, other) = json.loads((tmp_path / "out" / "results.json").read_text())["arms"]
    assert (entry["part"], other["part"]) == ("zero-shot", "embedding")
    rows = (tmp_path / "out" / "report.md").read_text().splitlines()
    assert rows[2].startswith("| w/o AT |"), "one row for the two parts"
    assert "100.0 ± 0.0 [51.0, 100.0]" in rows[2]
    # Another arm later does not push the first one out of the report.
    shutil.copy(two_class.partition("@")[2], tmp_path / "copy.safetensors")
    other_run = f"mlp:1x2x2-2@{tmp_path / 'copy.safetensors'}"
    assert run_command("embedding", other_run, *data, "--epsilons", "2/255") == 0
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["arms"]) == 3
    (tmp_path / "file").write_text("")
    assert run_command("embedding", two_class, *data[:4], "-o", str(tmp_path / "file")) == 2
    errors = capsys.readouterr().err
    assert str(tmp_path / "file") in errors


def test_help_names_the_parts(run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("--help") == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("pgd", "zero-shot", "embedding", "captions", "vqa", "all"))


def test_all_checks_every_part_first(
    two_class: str, photos: Path, tmp_path: Path, run_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "all.toml"
    config.write_text('[embedding]\nsteps = 2\n[zero-shot]\nhead = "outputs"\nstep = 2\n')
    arguments = ["all", two_class, "--config", str(config), "--data", str(photos), "-o", str(tmp_path / "out")]
    assert run_command(*arguments) == 2
    errors = capsys.readouterr().err
    assert "[zero-shot]: step: " in errors
    assert "steps" in errors
    assert not (tmp_path / "out").exists()
    config.write_text("steps = 2\n[embedding]\n")
    assert run_command(*arguments) == 0
    config.write_text("steps = 2\n")
    assert run_command(*arguments) == 2
    assert "[pgd], [zero-shot], [embedding], [captions], [vqa]" in capsys.readouterr().err


def test_damaged_results_are_refused(two_class: str, photos: Path, tmp_path: Path) -> None:
    embedding(two_class, photos, tmp_path / "out")
    (item,) = (tmp_path / "out").rglob("items/*.json")
    for text in ("{", "[" * 100_000):
        item.write_text(text)
        with refused(DatamergeError, None, f"{item}: "):
            embedding(two_class, photos, tmp_path / "out")
    (tmp_path / "out" / "embedding" / "results.json").write_text("[" * 100_000)
    with refused(DatamergeError, None, f"{tmp_path / 'out' / 'embedding' / 'results.json'}: "):
        write_reports(str(tmp_path / "out"), "embedding", [])
