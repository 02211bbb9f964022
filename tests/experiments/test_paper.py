"""The paper's experiment: its requirements, its estimated cost, and the whole script on tiny models."""

from __future__ import annotations

import gc
import json
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from experiments.paper import cost
from experiments.paper.pipeline import Experiment
from experiments.paper.run import HERE, main
from experiments.paper.settings import Arm, Study, read_study
from tests.support.llava import make_llava
from trainer.config import read_preset

SETTINGS = HERE / "settings.toml"
ENCODER = "open_clip:ViT-S-32-alt"
# The encoder's tokens of an image, their width, its blocks, side of a patch and width of the embedding.
TOKENS, WIDTH, LAYERS, PATCH, EMBEDDING = 50, 384, 12, 32, 256


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def study() -> Study:
    return read_study(SETTINGS)


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The settings with a smaller encoder."""
    file = tmp_path / "small.toml"
    file.write_text(SETTINGS.read_text().replace("open_clip:ViT-L-14/openai", ENCODER))
    return file


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def missing(result: Result) -> list[str]:
    lines = result.stderr.splitlines()
    return [line.removeprefix("missing: ") for line in lines if line.startswith("missing: ")]


def test_settings_are_the_papers(study: Study) -> None:
    preset = read_preset("paper")
    shared = preset.keys() & study.train.keys()
    assert shared >= {"loss", "loss_scale", "learning_rate", "weight_decay", "batch_size", "steps", "warmup_steps"}
    assert {name: study.train[name] for name in shared} == {name: preset[name] for name in shared}
    attack = {name: study.merge[name] for name in ("members", "epsilon", "steps", "step_size", "objective")}
    assert attack == {
        "members": 10,
        "epsilon": "2/255",
        "steps": 10,
        "step_size": "1/255",
        "objective": "squared_error",
    }
    assert (study.evaluate["sample"], study.evaluate["sample_seed"], study.groups) == (100, 42, 5000)
    individual = {f"AT-{n}-Ind": Arm(artifact="members", arm="ind", members=n) for n in (1, 2, 5, 10)}
    assert {name: arm for name, arm in study.arms.items() if name.endswith("Ind")} == individual
    averages = {name: study.size(arm.artifact) for name, arm in study.arms.items() if arm.arm == "avg"}
    assert averages == {"AT-2-Avg": 2, "AT-5-Avg": 5, "AT-10-Avg": 10}
    assert study.published.keys() - study.arms.keys() == {"w/o AT"}


@pytest.mark.usefixtures("empty_cache")
def test_all_missing_files_are_reported_at_once(small: Path, tmp_path: Path) -> None:
    small.write_text(small.read_text().replace(ENCODER, f"{ENCODER}@weights.pt"))
    arguments = (small, "--data", tmp_path / "nothing", "--work", tmp_path / "work")
    result = invoke(*arguments, "--dry-run", "--gpu-price", 2)
    assert result.exit_code == 2
    for line, path in zip(
        missing(result),
        ["weights.pt", "imagenet/train", "coco/dataset_coco.json", "vqav2/v2_OpenEnded", "llava-hf/llava-1.5-7b-hf"],
        strict=True,
    ):
        assert path in line
    assert "5 problems" in result.stderr
    assert "5,000 steps" in result.stdout
    assert "5,000 groups" in result.stdout
    assert "at 2 a GPU hour: " in result.stdout
    assert not (tmp_path / "work").exists()
    assert invoke(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("right", "wrong", "facts"),
    [
        ("warmup_steps", "warm_up", ["warm_up: ", "warmup_steps"]),
        ('"sketch", arm', '"sktch", arm', ["arms.AT-10-Factors.artifact: ", "members, n2, n5, sketch"]),
    ],
)
def test_wrong_settings_are_refused_first(small: Path, right: str, wrong: str, facts: list[str]) -> None:
    small.write_text(small.read_text().replace(right, wrong))
    result = invoke(small, "--data", small.parent, "--work", small.parent / "work", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert [fact for fact in facts if fact not in result.stderr] == []


@pytest.mark.usefixtures("empty_cache")
def test_too_few_images_are_reported(small: Path, tmp_path: Path) -> None:
    (tmp_path / "imagenet/train/n01440764").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "imagenet/train/n01440764/a.png")
    study = read_study(small)
    found = Experiment(study, study.data.below(tmp_path), tmp_path / "work").problems()
    [line] = [line for line in found if line.startswith("data.images: ")]
    assert "5,000 images" in line
    assert "image_folder with 1 in" in line


@pytest.mark.usefixtures("empty_cache")
def test_the_estimate_equals_one_by_hand(small: Path, tmp_path: Path) -> None:
    study = read_study(small)
    experiment = Experiment(study, study.data.below(tmp_path), tmp_path)
    gpu = cost.Gpu({"half": 400e12, "float32": 60e12}, 0.5)
    stages = {stage.name: stage for stage in cost.estimate(experiment, gpu)}
    # One image: blocks of 12·width² weights and two attention products each; patches; projection.
    attention = LAYERS * 4 * TOKENS**2 * WIDTH
    forward = LAYERS * 2 * TOKENS * 12 * WIDTH**2 + attention
    forward += 2 * (TOKENS - 1) * 3 * PATCH**2 * WIDTH + 2 * WIDTH * EMBEDDING
    attack = stages["attack, N = 10"]
    flops = (1 + 10 * 21) * forward + 10 * 10 * attention
    assert attack.hours == pytest.approx(5000 * flops / 30e12 / 3600)
    assert attack.disk == pytest.approx(5000 * (150_528 * 12.07 + 4 * EMBEDDING))
    assert stages["remerge sketch"].disk == pytest.approx(5000 * (150_528 * 3.07 + 4 * EMBEDDING))
    assert stages["train AT-5-Ind"].hours == pytest.approx(5000 * 15 * forward / 30e12 / 3600)
    assert stages["train AT-5-Avg"].hours == pytest.approx(5000 * 6 * forward / 30e12 / 3600)
    assert stages["train AT-10-Random"].hours == pytest.approx(5000 * 3 * forward / 30e12 / 3600)
    # LLaVA-1.5-7B: patches of 14 pixels and 80 tokens of text. 10 arms, 100 images: six generations and five
    # attacks in half precision, one more of both in float32.
    layer, tokens = 4 * 4096**2 + 3 * 4096 * 11008, 256 + 80
    language = 32 * (2 * tokens * layer + 4 * tokens**2 * 4096) + 2 * 20 * 32064 * 4096
    one = forward + 2 * 256 * (1024 * 4096 + 4096**2) + language
    hours = 1000 * one * ((6 + 5 * 202) / 200e12 + 203 / 30e12) / 3600
    assert stages["evaluate captions, 10 arms"].hours == pytest.approx(hours, rel=1e-3)
    assert stages["evaluate vqa, 10 arms"].memory == pytest.approx(1.25 * 4 * 7.063e9, rel=1e-3)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Settings of two arms on three COCO images, a LLaVA and questions beside them."""
    coco = Path(os.environ.get("DATAMERGE_DATA", "")) / "coco_mini"
    if not os.environ.get("DATAMERGE_DATA") or not coco.is_dir():
        pytest.skip("DATAMERGE_DATA does not name a folder with coco_mini")
    captions = json.loads((coco / "annotations/captions_val2017.json").read_bytes())
    make_llava(tmp_path / "llava", [entry["caption"] for entry in captions["annotations"]], width=WIDTH)
    questions = [
        {"image_id": image["id"], "question": "What is it?", "question_id": image["id"]}
        for image in captions["images"]
    ]
    annotations = [{"question_id": entry["question_id"], "answers": [{"answer": "yes"}] * 10} for entry in questions]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2017", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    (tmp_path / "coco").symlink_to(coco)
    original = tomllib.loads(SETTINGS.read_text())
    data = {
        "images": "coco/train2017",
        "encoder": ENCODER,
        "llava": "llava",
        "coco_captions": "coco/annotations/captions_val2017.json",
        "coco_images": "coco/val2017",
        "vqa_questions": "q.json",
        "vqa_annotations": "a.json",
        "vqa_images": "coco/val2017",
    }
    tables = {
        "data": data,
        "draw": original["draw"],
        "merge": original["merge"] | {"members": 2, "steps": 1, "groups_per_shard": 2, "max_workers": 1},
        "train": original["train"] | {"steps": 3, "warmup_steps": 1, "threads": 1},
        "evaluate": {"sample": 1, "steps": 1, "threads": 1, "device": "cpu"},
    }
    lines = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    lines += ["[remerge]", "sketch = { factors = 1 }", "[published]", "AT-2-Avg = [119.5, 17.9, 69.4, 25.9]"]
    lines += ["[arms]", 'AT-2-Avg = { artifact = "members", arm = "avg" }']
    lines += ['AT-2-Factors = { artifact = "sketch", arm = "factors" }']
    file = tmp_path / "tiny.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


# Ray's start-up leaves file handles and sockets to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("ray_driver")
def test_the_whole_script_on_tiny_models_and_its_repetition(tiny: Path) -> None:
    work = tiny.parent / "work"
    arguments = (tiny, "--data", tiny.parent, "--work", work)
    assert "all requirements are met" in invoke(*arguments, "--dry-run").output
    assert not work.exists()
    result = invoke(*arguments)
    gc.collect()
    assert result.exit_code == 0, (result.output, result.exception)
    assert len(list((work / "images").rglob("*.jpg"))) == 3
    found = json.loads((work / "results.json").read_bytes())["rows"]
    assert list(found) == ["w/o AT", "AT-2-Avg", "AT-2-Factors"]
    assert all(list(row) == ["COCO clean", "COCO adv.", "VQAv2 clean", "VQAv2 adv."] for row in found.values())
    assert "| AT-2-Avg |" in (work / "results.md").read_text()
    for name in ("AT-2-Avg", "AT-2-Factors"):
        # The trainer names the arm by the data that it was trained on.
        assert json.loads((work / "runs" / name / "run.json").read_bytes())["arm"] == name
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    finished = {path: path.stat().st_mtime_ns for path in before if _is_result(path)}
    assert len(finished) >= 3 + 2 + 2 + 2 * 3
    assert invoke(*arguments).exit_code == 0
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    other = tiny.with_name("other.toml")
    other.write_text(tiny.read_text().replace("steps = 3", "steps = 2"))
    result = invoke(other, "--data", tiny.parent, "--work", work)
    assert result.exit_code == 2
    for fact in (work / "images", "'count': 3", "'count': 2", "--work"):
        assert str(fact) in result.stderr


def _is_result(path: Path) -> bool:
    """Whether a file took long to compute: drawn images, shards, trained weights and answers."""
    return path.suffix == ".jpg" or path.parent.name in ("commits", "items") or path.name == "encoder.safetensors"


def test_arms_locked_by_another_process_are_skipped(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    measured: list[str] = []
    monkeypatch.setattr(Experiment, "artifacts", lambda _: None)
    monkeypatch.setattr(Experiment, "measure", lambda _, name: measured.append(name))
    with FileLock(tmp_path / "AT-2-Avg.lock"):
        taken = Experiment(study, study.data.below(tmp_path), tmp_path).run()
    assert taken == ["AT-2-Avg"]
    assert measured == ["w/o AT", *(name for name in study.arms if name != "AT-2-Avg")]


def test_images_are_drawn_from_all_classes(study: Study, tmp_path: Path) -> None:
    for number in range(60):
        (tmp_path / f"imagenet/train/{number // 10}").mkdir(parents=True, exist_ok=True)
        Image.new("L", (1, 1), number).save(tmp_path / f"imagenet/train/{number // 10}/{number}.png")
    few = study.model_copy(update={"train": study.train | {"steps": 30}})
    drawn = []
    for work in (tmp_path / "a", tmp_path / "b"):
        work.mkdir()
        Experiment(few, study.data.below(tmp_path), work).draw()
        drawn.append(sorted(path.relative_to(work / "images") for path in (work / "images").rglob("*.png")))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 30
    assert len({path.parent for path in drawn[0]}) == 6
