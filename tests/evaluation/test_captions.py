"""`datamerge evaluate captions` and `vqa` from the official files to the report, on a small LLaVA and real images."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation.llava.attack import AnswerLoss, attack_answers, plan_passes
from datamerge.evaluation.llava.captions import evaluate_captions
from datamerge.evaluation.llava.cider import CaptionScorer
from datamerge.evaluation.llava.coco import Captioned
from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
from datamerge.evaluation.llava.model import Llava
from datamerge.evaluation.llava.vqa import evaluate_vqa, most_frequent
from datamerge.evaluation.results import ArmResult
from datamerge.evaluation.store import ArmFolder
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, DatamergeError, SourceError
from storage_schemas.schema.pixel_length import PixelLength
from tests.support.html_pages import Page
from tests.support.refusals import refused

EPSILON = "24/255"


@pytest.fixture(scope="module")
def settings(llava_path: str, coco: Path, caption_file: str) -> dict[str, Any]:
    return {
        "runs": ["own"],
        "data": caption_file,
        "images": str(coco / "val2017"),
        "llava": llava_path,
        "image_size": 0,
        "sample": 4,
        "epsilon": EPSILON,
        "steps": 6,
        "pictures": 2,
        "device": "cpu",
    }


def captions(settings: Mapping[str, Any], output: Path, **changes: Any) -> list[ArmResult]:
    return evaluate_captions(load_settings(CaptionsConfig, None, {**settings, "output": str(output), **changes}))


@pytest.fixture(scope="module")
def finished(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArmResult]:
    """An evaluation without interruptions."""
    output = tmp_path_factory.mktemp("finished")
    (result,) = captions(settings, output)
    return output, result


def items(output: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(output.rglob("items/*.json"))}


def test_the_attack_lowers_scores_and_records_its_passes(
    finished: tuple[Path, ArmResult], captioned: list[Captioned]
) -> None:
    output, result = finished
    clean, adversarial = result.scores
    assert [score.name for score in result.scores] == ["COCO clean", "COCO adv."]
    # Two of three memorised captions would do; random ones score nothing.
    assert clean.value > 100
    assert adversarial.value < 0.8 * clean.value
    assert clean.low <= clean.value <= clean.high
    states = items(output)
    assert states.keys() == {image.key for image in captioned}
    scorer = CaptionScorer({image.key: image.captions for image in captioned})
    for key, state in states.items():
        passes = state["passes"]
        assert passes[0]["name"] == "clean"
        for entry in passes:
            # Scores are pycocoevalcap's of the answers as stored.
            assert entry["score"] == pytest.approx(scorer.scores({key: entry["answer"]})[key])
            if entry["loss"] is not None:
                assert entry["loss"] >= entry["start_loss"]
    assert clean.value == pytest.approx(np.mean([state["passes"][0]["score"] for state in states.values()]))
    lowest = [min(entry["score"] for entry in state["passes"]) for state in states.values()]
    assert adversarial.value == pytest.approx(np.mean(lowest))


def test_images_below_the_threshold_are_not_attacked_further(finished: tuple[Path, ArmResult]) -> None:
    for state in items(finished[0]).values():
        below = [entry["score"] < 10 for entry in state["passes"]]
        assert not any(below[:-1]), "no pass after one that brought the score down"
        assert state["dropped"] == below[-1]
        if not below[-1]:
            names = [entry["name"] for entry in state["passes"]]
            assert names == ["clean", *(f"answer {i}" for i in range(1, 6)), "refined"]
            refined = state["passes"][-1]
            assert refined["start_loss"] is not None
            assert refined["arithmetic"] == "float32"


@pytest.mark.parametrize(("half", "search"), [("float32", "tf32"), ("bfloat16", "bfloat16")])
def test_a_pass_records_the_arithmetic_of_its_search(
    settings: dict[str, Any], tmp_path: Path, half: str, search: str
) -> None:
    captions(settings, tmp_path / "out", precision="tf32", half=half, steps=1)
    passes = [entry for state in items(tmp_path / "out").values() for entry in state["passes"]]
    found = {(entry["name"] == "clean", entry["arithmetic"]) for entry in passes if entry["name"] != "refined"}
    assert found == {(True, half), (False, search)}
    assert {entry["arithmetic"] for entry in passes if entry["name"] == "refined"} <= {"tf32"}


def test_stored_pictures_are_inside_the_ball(finished: tuple[Path, ArmResult], captioned: list[Captioned]) -> None:
    output, result = finished
    assert len(result.details["pictures"]) == 2
    for image in captioned[:2]:
        (adversarial,) = output.rglob(f"images/{image.key}.png")
        clean = np.asarray(Image.open(adversarial.with_name(f"{image.key}-clean.png"))).astype(int)
        assert np.abs(np.asarray(Image.open(adversarial)).astype(int) - clean).max() <= 24
        assert set(items(output)[image.key]["eight_bit"]) == {"answer", "score"}
    assert not list(output.rglob("*.npy")), "working files of finished images are removed"


def test_an_interrupted_evaluation_is_resumed(
    settings: dict[str, Any], finished: tuple[Path, ArmResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = ArmFolder.write, 0

    def interrupted(self: ArmFolder, *arguments: Any) -> None:
        nonlocal count
        count += 1  # a pass of an image, which is stored at its end
        if count == 4:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(ArmFolder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        captions(settings, tmp_path)
    done = sum(len(state["passes"]) for state in items(tmp_path).values())
    assert done == 3
    count = 10
    captions(settings, tmp_path)
    assert count - 10 == sum(len(state["passes"]) for state in items(finished[0]).values()) - done
    assert without_times(items(tmp_path)) == without_times(items(finished[0]))
    count = 20
    captions(settings, tmp_path)
    assert count == 20, "nothing is done twice"


def without_times(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    for state in states.values():
        for entry in state["passes"]:
            del entry["seconds"]
    return states


def test_batches_do_not_change_answers(
    settings: dict[str, Any], finished: tuple[Path, ArmResult], tmp_path: Path
) -> None:
    (result,) = captions(settings, tmp_path, batch_size=3)
    assert [score.value for score in result.scores] == pytest.approx(
        [score.value for score in finished[1].scores], rel=0.02
    )


def test_other_settings_in_the_same_folder_are_refused(
    settings: dict[str, Any], finished: tuple[Path, ArmResult]
) -> None:
    with refused(ConfigError, "output", "(steps: 6 ", ", 7 "):
        captions(settings, finished[0], steps=7)


def test_other_captions_under_the_same_keys_are_refused(
    settings: dict[str, Any], finished: tuple[Path, ArmResult], tmp_path: Path
) -> None:
    text = Path(settings["data"]).read_text()
    (tmp_path / "others.json").write_text(text.replace('"a ', '"two ').replace('"A ', '"Two '))
    assert (tmp_path / "others.json").read_text() != text
    with refused(ConfigError, "output", "(content_sha256: "):
        captions(settings, finished[0], data=str(tmp_path / "others.json"))


def test_passes_are_planned_in_order() -> None:
    assert [step.name for step in plan_passes(10, (), True)] == [
        "clean",
        *(f"answer {i}" for i in range(1, 6)),
        "refined",
    ]
    assert [step.name for step in plan_passes(2, ("maybe", "Word"), True)] == [
        "clean",
        "answer 1",
        "answer 2",
        "refined",
        '"maybe"',
        '"Word"',
    ]
    assert [step.name for step in plan_passes(2, ("maybe",), False)] == ["clean"]
    assert most_frequent(["b", "a", "a", "c", "b", "d", "e", "f"]) == ["b", "a", "c", "d", "e"]


@pytest.mark.parametrize("targeted", [False, True])
def test_an_attack_lowers_or_raises_the_likelihood(llava: Llava, targeted: bool) -> None:
    clean = (torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    config = CaptionsConfig(runs=["own"], data="d", images="i", epsilon=PixelLength("4/255"), steps=8)
    questions, answers = ["What is it?"] * 2, ["maybe", "a man"]
    attempts = attack_answers(
        llava, clean, questions, answers, config.attack_settings(), ["a", "b"], targeted=targeted
    )
    tokens = llava.answers(questions, answers)
    before = llava.losses(clean, tokens)
    found = torch.stack([attempt.pixels for attempt in attempts if attempt.pixels is not None])
    after = llava.losses(found, tokens)
    assert bool(torch.all(after < before) if targeted else torch.all(after > before))
    assert [attempt.loss for attempt in attempts] == pytest.approx(after.tolist(), rel=1e-4)
    assert float((found - clean).abs().max()) <= 4 / 255 + 1e-7
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1


def test_an_overflowing_gradient_fails_only_its_image(llava: Llava, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = AnswerLoss.forward

    def overflow(self: AnswerLoss, pixels: Tensor) -> Tensor:
        # The black image overflows.
        dark = pixels.flatten(1).mean(dim=1) < 0.2
        return torch.where(dark, torch.full_like(dark, float("nan"), dtype=torch.float32), forward(self, pixels))

    monkeypatch.setattr(AnswerLoss, "forward", overflow)
    clean = torch.stack([torch.zeros(3, 32, 32), torch.full((3, 32, 32), 0.5)])
    config = CaptionsConfig(runs=["own"], data="d", images="i", steps=2)
    bad, good = attack_answers(
        llava, clean, ["?", "?"], ["yes", "no"], config.attack_settings(), ["dark.jpg", "grey.jpg"], targeted=False
    )
    assert bad.pixels is None
    assert "not finite for dark.jpg" in str(bad.failure)
    assert good.pixels is not None


def test_images_of_a_batch_have_passes_of_their_own(
    settings: dict[str, Any], captioned: list[Captioned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [["yes"] * 10, ["yes"] * 5 + ["no"] * 5, ["yes"] * 4 + ["no"] * 3 + ["2"] * 3]
    questions = [
        {"image_id": int(image.key), "question": "What is it?", "question_id": i}
        for i, image in enumerate(captioned[:3])
    ]
    annotations = [{"question_id": i, "answers": [{"answer": a} for a in given]} for i, given in enumerate(people)]
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2017", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations}))
    monkeypatch.setattr(Llava, "generate", lambda _, pixels, *__: ["yes"] * len(pixels))
    flags = {**settings, "data": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json"), "steps": 1}
    evaluate_vqa(load_settings(VqaConfig, None, {**flags, "output": str(tmp_path / "out"), "batch_size": 3}))
    states = items(tmp_path / "out")
    for key, given in enumerate(people):
        plan = plan_passes(len(set(given)), ("maybe", "Word"), True)
        passes = states[str(key)]["passes"]
        assert [entry["name"] for entry in passes] == [step.name for step in plan]
        assert [entry["target"] for entry in passes] == [step.target for step in plan]
    item = next((tmp_path / "out").rglob("items/0.json"))
    state = json.loads(item.read_text())
    item.write_text(json.dumps({**state, "passes": state["passes"][:1], "tower_sha256": "0" * 64}))
    with refused(ConfigError, "output", "'own'", "weights"):
        evaluate_vqa(load_settings(VqaConfig, None, {**flags, "output": str(tmp_path / "out"), "batch_size": 3}))


@pytest.fixture(scope="module")
def vqa_files(tmp_path_factory: pytest.TempPathFactory, captioned: list[Captioned]) -> tuple[str, str]:
    """Questions in VQAv2's format; people answer with the beginnings of captions, which the model knows."""
    folder = tmp_path_factory.mktemp("vqa")
    keys = [int(image.key) for image in captioned]
    questions = [{"image_id": key, "question": "What is it?", "question_id": 10 * key} for key in keys]
    people = ["yes"] * 4 + ["no"] * 3 + ["two", "a cat", "red"]
    annotations = [
        {
            "question_id": question["question_id"],
            "answers": [{"answer": answer, "answer_id": i + 1} for i, answer in enumerate(people)],
        }
        for question in questions
    ]
    (folder / "questions.json").write_text(json.dumps({"data_subtype": "val2017", "questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))
    return str(folder / "questions.json"), str(folder / "annotations.json")


def test_vqa_counts_the_lowest_accuracy(
    settings: dict[str, Any],
    vqa_files: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    captioned: list[Captioned],
) -> None:
    questions_seen: list[str] = []

    def generate(self: Llava, pixels: Tensor, questions: list[str], new_tokens: int) -> list[str]:
        # A model that says yes to images as they are, no after one attack, and something else in the end.
        questions_seen.extend(questions)
        assert new_tokens == 5
        return [["Yes", "no, never", "no", "no", "no", "no", "no", "maybe"][min(len(questions_seen) - 1, 7)]] * len(
            questions
        )

    monkeypatch.setattr(Llava, "generate", generate)
    flags = {**settings, "data": vqa_files[0], "annotations": vqa_files[1], "sample": 1, "output": str(tmp_path)}
    (result,) = evaluate_vqa(load_settings(VqaConfig, None, {**flags, "steps": 1}))
    assert questions_seen[0] == "What is it?\nAnswer the question using a single word or phrase."
    (state,) = items(tmp_path).values()
    assert state["references"] == ["yes", "no", "two", "a cat", "red"]
    assert [entry["name"] for entry in state["passes"]][-3:] == ["answer 5", "refined", '"maybe"']
    assert [entry["answer"] for entry in state["passes"][:2]] == ["Yes", "no"]
    # yes: 4 of 10 people, no: 3 of 10; leave-one-out of min(matches / 3, 1).
    assert state["passes"][0]["score"] == pytest.approx(100)
    assert state["passes"][1]["score"] == pytest.approx(100 * (3 * 2 / 3 + 7) / 10)
    # The refinement starts from the image and reference that brought the accuracy down.
    assert state["passes"][6]["reference"] == 0
    assert [score.value for score in result.scores] == pytest.approx([100, 0])
    assert state["dropped"]


def test_both_parts_make_one_table(
    settings: dict[str, Any],
    vqa_files: tuple[str, str],
    make_clip: Callable[..., str],
    make_run: Callable[..., str],
    tmp_path: Path,
    run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = make_clip()
    save_encoder(load_encoder(clip), tmp_path / "encoder.safetensors")
    tuned = make_run(f"{clip}@{tmp_path / 'encoder.safetensors'}", clip, changes={"arm": "AT-10-Avg"})
    config = tmp_path / "all.toml"
    shared = {name: settings[name] for name in ("llava", "images", "image_size", "device")}
    lines = [f"{name} = {json.dumps(value)}" for name, value in shared.items()]
    lines += ["steps = 1", "sample = 2", "[captions]", f"data = {json.dumps(settings['data'])}", "[vqa]"]
    lines += [f"data = {json.dumps(vqa_files[0])}", f"annotations = {json.dumps(vqa_files[1])}"]
    config.write_text("\n".join(lines))
    output = tmp_path / "out"
    assert run_command("all", "own", tuned, "--config", str(config), "-o", str(output)) == 0
    markdown = (output / "report.md").read_text()
    header, _, *rows = markdown.splitlines()
    cells = [cell.strip() for cell in header.strip("|").split("|")]
    assert cells[2:6] == ["COCO clean", "COCO adv.", "VQAv2 clean", "VQAv2 adv."]
    assert [row.split("|")[1].strip() for row in rows[:2]] == ["w/o AT", "AT-10-Avg"]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d \[\d+\.\d, \d+\.\d\]", rows[0].split("|")[3].strip())
    page = Page((output / "report.html").read_text())
    shown = Counter(name.partition(" ×")[0] for name, _ in page.pictures)
    assert shown["image"] == 2 * 2 * 2, "of two images, two parts, two arms"
    assert shown["perturbation"] == shown["adversarial image"] <= shown["image"]
    assert len(page.drawings) == 2
    stored = json.loads((output / "results.json").read_text())["arms"]
    assert [(entry["part"], entry["arm"]) for entry in stored] == [
        ("captions", "w/o AT"),
        ("captions", "AT-10-Avg"),
        ("vqa", "w/o AT"),
        ("vqa", "AT-10-Avg"),
    ]
    assert "VQAv2 adv." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "kind", "field", "fact"),
    [
        ({"data": "nowhere.json"}, SourceError, None, "nowhere.json: "),
        ({"images": "nowhere"}, SourceError, None, "'nowhere'"),
        ({"llava": "/nowhere/at/all"}, ConfigError, "llava", "'/nowhere/at/all'"),
        ({"epsilon": "2"}, ConfigError, "epsilon", "2/255"),
        ({"runs": []}, ConfigError, "runs", "[]"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any],
    changes: dict[str, Any],
    kind: type[DatamergeError],
    field: str,
    fact: str,
    tmp_path: Path,
) -> None:
    with refused(kind, field, fact) as refusal:
        captions(settings, tmp_path, **changes)
    assert refusal.value.exit_code == 2
    assert not list(tmp_path.iterdir()), "nothing was written"


def test_a_large_model_needs_a_gpu(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A 7B model's configuration, without its weights.
    folder = tmp_path / "7b"
    folder.mkdir()
    config = json.loads((Path(settings["llava"]) / "config.json").read_text())
    of_32 = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 32)
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128, "vocab_size": 32064}
    config["text_config"] |= sizes | of_32
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(ConfigError, "device", " 6.8 billion ", " 34 GB"):
        captions(settings, tmp_path / "out", llava=str(folder), device="auto")


def test_broken_and_missing_images_are_refused(
    settings: dict[str, Any], captioned: list[Captioned], tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for image in captioned:
        shutil.copy(image.image, images)
    (images / captioned[1].image.name).write_bytes(b"no image")
    with refused(SourceError, None, f"{captioned[1].image.name}: "):
        captions(settings, tmp_path / "out", images=str(images), steps=1)
    assert not (tmp_path / "out").exists(), "before any work"
    (images / captioned[2].image.name).unlink()
    with refused(SourceError, None, " 1 ", f"'{captioned[2].image.name}'"):
        captions(settings, tmp_path / "out", images=str(images))
