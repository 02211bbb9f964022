"""The paper's experiment: what it asks for, what it says that it costs, and the whole script on tiny models."""

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
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamerge.encoders import load_encoder
from experiments.paper import cost, requirements
from experiments.paper.run import HERE, main
from experiments.paper.settings import Arm, Study, Vision, read_study
from tests.support.llava import make_llava
from trainer.config import read_preset

SETTINGS = HERE / "settings.toml"
ENCODER = "open_clip:ViT-S-32-alt"
SMALL = Vision(image_size=224, patch=32, layers=12, width=384, heads=6, hidden=1536, embedding=256)


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
def test_everything_missing_is_said_at_once(tmp_path: Path) -> None:
    result = invoke("--data", tmp_path / "nothing", "--work", tmp_path / "work", "--dry-run", "--gpu-price", 2)
    assert result.exit_code == 2
    names = [line.split(":")[0] for line in missing(result)]
    assert names == [
        "ImageNet's training images",
        "Karpathy's captions of COCO",
        "COCO's images",
        "VQAv2's questions",
        "VQAv2's answers",
        "VQAv2's images",
        "encoder weights",
        "LLaVA",
    ]
    for line, remedy in zip(
        missing(result), ["image-net.org", "caption_datasets", "val2014.zip", *["visualqa"] * 2], strict=False
    ):
        assert str(tmp_path / "nothing") in line
        assert remedy in line
    assert "hf download llava-hf/llava-1.5-7b-hf" in result.stderr
    assert "8 problems; nothing was started" in result.stderr
    assert "5,000 steps at batch 1 need 5,000 groups" in result.stdout
    assert "cost at 2 a GPU hour: " in result.stdout
    assert not (tmp_path / "work").exists()
    assert invoke("--data", tmp_path / "nothing", "--work", tmp_path / "work").exit_code == 2


def test_missing_packages_are_named_and_what_is_there_is_looked_at(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name in ("ray", "transformers") else name)

    def never() -> None:
        raise AssertionError("settings cannot be checked without the packages")

    (tmp_path / "coco" / "val2014").mkdir(parents=True)
    found = requirements.problems(study, study.data.below(tmp_path), never)
    assert found[0].startswith("packages: ray, transformers not installed; pip install")
    assert [line.split(":")[0] for line in found[1:]] == [
        "ImageNet's training images",
        "Karpathy's captions of COCO",
        "VQAv2's questions",
        "VQAv2's answers",
    ]


@pytest.mark.usefixtures("empty_cache")
def test_incomplete_data_and_wrong_settings(tmp_path: Path) -> None:
    (tmp_path / "imagenet/train/n01440764").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "imagenet/train/n01440764/a.png")
    llava = tmp_path / "llava"
    llava.mkdir()
    (llava / "config.json").write_text("{}")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (llava / requirements.INDEX).write_text(json.dumps({"weight_map": shards}))
    (llava / shards["a"]).write_bytes(b"")
    (tmp_path / "coco").mkdir()
    (tmp_path / "coco/dataset_coco.json").write_text('{"images": []}')
    text = SETTINGS.read_text().replace('"llava-hf/llava-1.5-7b-hf"', '"llava"').replace("warmup_steps", "warm_up")
    file = tmp_path / "settings.toml"
    file.write_text(text.replace("ViT-L-14/openai", "ViT-L-14@weights.pt"))
    found = missing(invoke(file, "--data", tmp_path, "--work", tmp_path / "work", "--dry-run"))
    assert any(
        "expected at least 5,000, one for each group that training takes, found 1 in" in line for line in found
    )
    assert f"encoder weights: expected a file at {tmp_path / 'weights.pt'}, found none" in "\n".join(found)
    assert f"LLaVA: expected tokenizer.json, {shards['b']} in {llava}, found none" in "\n".join(found)
    assert any("dataset_coco.json: expected" in line for line in found)
    assert any(line == "warm_up: unknown setting; did you mean warmup_steps?" for line in found)
    file.write_text(text.replace('"sketch", arm', '"sktch", arm'))
    result = invoke(file, "--data", tmp_path, "--work", tmp_path / "work", "--dry-run")
    assert result.exit_code == 2
    assert "arms.AT-10-Factors.artifact: expected one of members, n2, n5, sketch, found 'sktch'" in result.stderr


def test_flops_parameters_and_activations_are_those_of_the_network() -> None:
    encoder, counted = load_encoder(ENCODER), cost.ClipEncoder(SMALL)
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    # Not without gradients: then attention takes one fused step that torch does not count.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        encoder(pixels)
    assert counted.forward == flops.get_total_flops()
    parameters = {parameter.untyped_storage().data_ptr(): parameter.numel() for parameter in encoder.parameters()}
    assert counted.parameters == pytest.approx(sum(parameters.values()), rel=0.005)
    for training in (False, True):
        encoder.requires_grad_(training)
        kept: dict[int, tuple[torch.Tensor, int]] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, tuple[torch.Tensor, int]] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                kept[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoder(pixels.clone().requires_grad_())
        found = sum(size for _, size in kept.values())
        assert counted.blocks.kept(counted.tokens, training) == pytest.approx(found, rel=0.15)


def test_llava_has_as_many_parameters_as_llava(study: Study) -> None:
    import transformers

    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig())
    expected = sum(parameter.numel() for parameter in model.parameters())
    assert cost.Llava(study.vision, study.language).parameters == pytest.approx(expected, rel=0.001)


def test_the_estimate_by_hand(study: Study) -> None:
    stages = {stage.name: stage for stage in cost.estimate(study, cost.Gpu({"half": 400e12, "float32": 60e12}, 0.5))}
    # One image: 24 blocks of 257 tokens, 12·1024² weights and two attention products each; patches; projection.
    forward = 24 * (2 * 257 * 12 * 1024**2 + 4 * 257**2 * 1024) + 2 * 256 * 588 * 1024 + 2 * 1024 * 768
    assert forward == pytest.approx(162.0e9, rel=1e-3)
    attack = stages["attack, N = 10"]
    assert attack.hours == pytest.approx(5000 * (1 + 10 * 21) * forward / 30e12 / 3600)
    assert attack.disk == pytest.approx(5000 * (150_528 * 12.07 + 3072))
    assert stages["remerge sketch"].disk == pytest.approx(5000 * (150_528 * 3.07 + 3072))
    assert stages["train AT-5-Ind"].hours == pytest.approx(5000 * 15 * forward / 30e12 / 3600)
    assert stages["train AT-5-Avg"].hours == pytest.approx(5000 * 6.9 * forward / 30e12 / 3600)
    assert stages["train AT-10-Random"].hours == pytest.approx(5000 * 3 * forward / 30e12 / 3600)
    weights = 24 * 12 * 1024**2 + 588 * 1024 + (257 + 768) * 1024
    one_image = 4 * 24 * 257 * 16 * 1024
    assert stages["train AT-10-Factors"].memory == pytest.approx(16 * weights + one_image)
    assert stages["train AT-10-Ind"].memory == pytest.approx(16 * weights + 10 * one_image)
    # 10 arms, 100 images: six generations and five attacks in half precision, one more of both in float32.
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    vision = 23 * (2 * 257 * 12 * 1024**2 + 4 * 257**2 * 1024) + 2 * 256 * 588 * 1024
    language = 32 * (2 * 336 * layer + 4 * 336**2 * 4096) + 2 * 20 * 32064 * 4096
    one = vision + 2 * 256 * (1024 * 4096 + 4096**2) + language
    hours = 1000 * one * ((6 + 5 * 202) / 200e12 + 203 / 30e12) / 3600
    assert stages["evaluate captions, 10 arms"].hours == pytest.approx(hours)
    assert stages["evaluate vqa, 10 arms"].memory == pytest.approx(1.25 * 4 * 7.063e9, rel=1e-3)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Settings of two arms on three COCO images, a LLaVA and questions beside them."""
    coco = Path(os.environ.get("DATAMERGE_DATA", "")) / "coco_mini"
    if not os.environ.get("DATAMERGE_DATA") or not coco.is_dir():
        pytest.skip("DATAMERGE_DATA does not name a folder with coco_mini")
    captions = json.loads((coco / "annotations/captions_val2017.json").read_bytes())
    make_llava(tmp_path / "llava", [entry["caption"] for entry in captions["annotations"]], width=SMALL.width)
    asked = [
        {"image_id": image["id"], "question": "What is it?", "question_id": image["id"]}
        for image in captions["images"]
    ]
    answered = [{"question_id": entry["question_id"], "answers": [{"answer": "yes"}] * 10} for entry in asked]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2017", "questions": asked}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answered}))
    (tmp_path / "coco").symlink_to(coco)
    kept = tomllib.loads(SETTINGS.read_text())
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
        "draw": kept["draw"],
        "merge": kept["merge"] | {"members": 2, "steps": 1, "groups_per_shard": 2, "max_workers": 1},
        "train": kept["train"] | {"steps": 3, "warmup_steps": 1, "threads": 1},
        "evaluate": {"sample": 1, "steps": 1, "threads": 1, "device": "cpu"},
        "vision": SMALL.model_dump(),
        "language": kept["language"],
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


# Ray's own start-up leaves file handles and sockets to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("ray_driver")
def test_the_whole_script_on_tiny_models_and_again(tiny: Path) -> None:
    work = tiny.parent / "work"
    arguments = (tiny, "--data", tiny.parent, "--work", work)
    assert "everything that is needed is there" in invoke(*arguments, "--dry-run").output
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
        # The trainer's own words for what it trained on.
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
    assert "choose another --work" in result.stderr


def _is_result(path: Path) -> bool:
    """What is dear to make: drawn images, shards, trained weights, answers."""
    return path.suffix == ".jpg" or path.parent.name in ("commits", "items") or path.name == "encoder.safetensors"


def test_arms_that_another_process_is_at_are_left_to_it(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    from experiments.paper.pipeline import Experiment

    measured: list[str] = []
    monkeypatch.setattr(Experiment, "artifacts", lambda _: None)
    monkeypatch.setattr(Experiment, "measure", lambda _, name: measured.append(name))
    with FileLock(tmp_path / "AT-2-Avg.lock"):
        taken = Experiment(study, study.data.below(tmp_path), tmp_path).run()
    assert taken == ["AT-2-Avg"]
    assert measured == ["w/o AT", *(name for name in study.arms if name != "AT-2-Avg")]


def test_images_are_drawn_from_all_classes(study: Study, tmp_path: Path) -> None:
    from experiments.paper.pipeline import Experiment

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
