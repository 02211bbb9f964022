"""Results of other weights, data or settings are neither reused nor mixed in one table."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from datamerge.encoders import load_encoder, save_encoder
from datamerge.evaluation.config import EmbeddingConfig
from datamerge.evaluation.embedding import evaluate_embedding
from datamerge.evaluation.llava.captions import evaluate_captions
from datamerge.evaluation.llava.cases import CaseRecord
from datamerge.evaluation.llava.config import CaptionsConfig, VqaConfig
from datamerge.evaluation.llava.model import Llava
from datamerge.evaluation.llava.study import ArmStudy
from datamerge.evaluation.llava.vision_towers import read_tower_run
from datamerge.evaluation.llava.vqa import evaluate_vqa
from datamerge.evaluation.parts import PARTS
from datamerge.evaluation.reports import write_reports
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, DatamergeError
from tests.support.llava import make_llava
from tests.support.refusals import refused

MakeEncoder = Callable[[list[list[float]]], str]
MakeRun = Callable[..., str]


def scale(spec: str, path: Path, factor: float) -> None:
    """Write the spec's weights times a factor."""
    encoder = load_encoder(spec)
    for parameter in encoder.model.parameters():
        parameter.data *= factor
    save_encoder(encoder, path)


@pytest.fixture
def settings(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings with one image, a LLaVA that always answers `a cat`, and one folder for all results."""
    Image.new("RGB", (32, 32), (90, 30, 200)).save(tmp_path / "000000000001.jpg", quality=95)
    content = {
        "images": [{"id": 1, "file_name": "000000000001.jpg"}],
        "annotations": [{"image_id": 1, "caption": "a cat"}],
    }
    (tmp_path / "captions.json").write_text(json.dumps(content))
    monkeypatch.setattr(Llava, "generate", lambda _, pixels, *__: ["a cat"] * len(pixels))
    return {
        "data": str(tmp_path / "captions.json"),
        "images": str(tmp_path),
        "llava": make_llava(tmp_path_factory.mktemp("llava"), ["a cat"]),
        "image_size": 0,
        "attack": False,
        "device": "cpu",
        "output": str(tmp_path / "out"),
    }


@pytest.fixture
def caption(settings: dict[str, Any]) -> Callable[..., None]:
    def run(*names: str, **changes: Any) -> None:
        evaluate_captions(load_settings(CaptionsConfig, None, {**settings, "runs": list(names), **changes}))

    return run


def test_finished_captions_of_other_weights_are_refused(
    caption: Callable[..., None], make_clip: Callable[..., str], make_run: MakeRun, tmp_path: Path
) -> None:
    clip, path = make_clip(), tmp_path / "encoder.safetensors"
    scale(clip, path, 1)
    run = make_run(f"{clip}@{path}", clip)
    for name in (run, f"{clip}@{path}"):
        caption(name)
        caption(name)
    # Trained again into the same folder.
    scale(clip, path, 2)
    for name in (run, f"{clip}@{path}"):
        with refused(ConfigError, "output", "(encoder_sha256: "):
            caption(name)


def test_finished_captions_of_another_hugging_face_tower_are_refused(
    caption: Callable[..., None], tmp_path: Path
) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    tower = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(num_hidden_layers=3, **sizes))
    tower.save_pretrained(tmp_path / "tower")
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "tower")
    caption(f"hf:{tmp_path / 'tower'}")
    caption(f"hf:{tmp_path / 'tower'}/")
    (identity,) = (tmp_path / "out" / "captions").glob("*/identity.json")
    # Releases before 0.2.0 did not record the preprocessing.
    earlier = {name: value for name, value in json.loads(identity.read_text()).items() if name != "preprocessing"}
    identity.write_text(json.dumps(earlier))
    caption(f"hf:{tmp_path / 'tower'}")
    earlier_mean, processor.image_mean = processor.image_mean, [0.5, 0.5, 0.5]
    processor.save_pretrained(tmp_path / "tower")
    with refused(ConfigError, "output", "(preprocessing.mean: ", "0.4578275", "0.5"):
        caption(f"hf:{tmp_path / 'tower'}")
    processor.image_mean = earlier_mean
    processor.save_pretrained(tmp_path / "tower")
    for parameter in tower.parameters():
        parameter.data *= 2
    tower.save_pretrained(tmp_path / "tower")
    with refused(ConfigError, "output", "(encoder_sha256: "):
        caption(f"hf:{tmp_path / 'tower'}")


def test_an_arm_of_other_weights_is_refused_before_another_is_measured(
    caption: Callable[..., None], make_clip: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, path = make_clip(), tmp_path / "encoder.safetensors"
    scale(clip, path, 1)
    caption(f"{clip}@{path}")
    scale(clip, path, 2)
    monkeypatch.setattr(ArmStudy, "measure", lambda *_: pytest.fail("hours of attacks before the refusal"))
    with refused(ConfigError, "output", "(encoder_sha256: "):
        caption("own", f"{clip}@{path}")


def test_finished_captions_of_other_data_are_refused(caption: Callable[..., None], tmp_path: Path) -> None:
    caption("own")
    caption("own")
    before = (tmp_path / "captions.json").read_text()
    (tmp_path / "captions.json").write_text(before.replace("a cat", "a dog"))
    with refused(ConfigError, "output", "(content_sha256: "):
        caption("own")
    (tmp_path / "captions.json").write_text(before)
    caption("own")
    image = tmp_path / "000000000001.jpg"
    data = image.read_bytes()
    image.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with refused(ConfigError, "output", "(content_sha256: "):
        caption("own")


def test_scores_of_another_tokeniser_are_refused(
    caption: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    caption("own")
    monkeypatch.undo()
    monkeypatch.setattr(Llava, "generate", lambda _, pixels, *__: ["a cat"] * len(pixels))
    if shutil.which("java") is None:
        pytest.skip("no Java here to score with")
    with refused(ConfigError, "output", "(scorer: ", "PTBTokenizer"):
        caption("own")


def test_other_answers_with_the_same_most_frequent_ones_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    question = {"image_id": 1, "question": "What is it?", "question_id": 7}
    (tmp_path / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": [question]}))

    def ask(people: list[str]) -> None:
        answers = [{"question_id": 7, "answers": [{"answer": answer} for answer in people]}]
        (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
        flags = {"runs": ["own"], "data": str(tmp_path / "q.json"), "annotations": str(tmp_path / "a.json")}
        evaluate_vqa(load_settings(VqaConfig, None, {**settings, **flags}))

    ask(["cat"] * 8 + ["dog"] * 2)
    ask(["cat"] * 8 + ["dog"] * 2)
    with refused(ConfigError, "output", "(content_sha256: "):
        ask(["cat"] * 7 + ["dog"] * 3)


def test_arms_of_llava_with_other_settings_do_not_share_a_table(
    caption: Callable[..., None], make_clip: Callable[..., str]
) -> None:
    caption("own")
    with refused(ConfigError, "output", "(fit: 'pad' ", ", 'crop' "):
        caption(make_clip(), fit="crop")
    caption(make_clip(), batch_size=2)


def embed(run: str, data: Path, output: Path, **flags: Any) -> None:
    values = {"runs": [run], "data": str(data), "output": str(output), "steps": 2, "epsilons": ["2/255"], **flags}
    write_reports(str(output), "embedding", evaluate_embedding(load_settings(EmbeddingConfig, None, values)))


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"steps": 3}, ["(steps: 2 ", ", 3 "]),
        ({"norm": "l2"}, ["(norm: ", "l2"]),
        ({"limit_first": 2}, ["(limit: ", ", 2 "]),
        ({"limit": 2}, ["(limit_drawn: ", ", 2 "]),
        ({"seed": 1}, ["(seed: ", ", 1 "]),
    ],
)
def test_arms_of_other_settings_do_not_share_a_table(
    make_encoder: MakeEncoder, photos: Path, tmp_path: Path, flags: dict[str, Any], named: list[str]
) -> None:
    first, second = make_encoder([[1.0] * 4]), make_encoder([[2.0] * 4])
    embed(first, photos, tmp_path / "out")
    with refused(ConfigError, "output", *named):
        embed(second, photos, tmp_path / "out", **flags)
    embed(second, photos, tmp_path / "out", batch_size=3)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["arms"]) == 2


def test_results_of_other_pixels_are_refused(make_encoder: MakeEncoder, photos: Path, tmp_path: Path) -> None:
    """Also those of a release that recorded no preprocessing: it resized the shorter side of every image."""
    spec = make_encoder([[1.0] * 4])
    embed(spec, photos, tmp_path / "out")
    (identity,) = (tmp_path / "out").rglob("identity.json")
    found = json.loads(identity.read_text())
    own = load_encoder(spec).preprocessing.record()
    assert found.pop("preprocessing") == found.pop("original_preprocessing") == own
    identity.write_text(json.dumps(found))
    embed(spec, photos, tmp_path / "out")
    for release in (found, json.loads(identity.read_text())):
        encoder = load_encoder(spec)
        encoder.preprocessing = encoder.preprocessing.model_copy(update={"resize": "squash"})
        save_encoder(encoder, spec.partition("@")[2])
        identity.write_text(json.dumps(release))
        with refused(ConfigError, "output", "preprocessing.resize: 'shortest' there, 'squash' now"):
            embed(spec, photos, tmp_path / "out")


def test_a_slash_at_the_end_names_the_same_run(make_encoder: MakeEncoder, make_run: MakeRun, photos: Path) -> None:
    spec = make_encoder([[1.0] * 4])
    run, output = make_run(spec, spec), photos.parent / "out"
    embed(run, photos, output)
    embed(f"{run}/", photos, output)
    assert len(json.loads((output / "results.json").read_text())["arms"]) == 1
    assert len(list((output / "embedding").glob("*/identity.json"))) == 1
    assert read_tower_run("hf:a/b/").name == "hf:a/b"


def test_settings_without_results_do_not_restrict_other_arms(
    overflowing: str, make_encoder: MakeEncoder, photos: Path, tmp_path: Path
) -> None:
    first, second = overflowing, make_encoder([[2.0] * 4])
    with refused(DatamergeError, None, "dark/far.png, dark/near.png"):
        embed(first, photos, tmp_path / "out", steps=1000)
    embed(second, photos, tmp_path / "out")
    scale(second.partition("@")[0], Path(first.partition("@")[2]), 1)
    embed(first, photos, tmp_path / "out")
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["arms"]) == 2


def test_results_and_cases_of_the_first_release_are_read(tmp_path: Path) -> None:
    """They lack the cost of training, and list rejected images under `details`."""
    score = {"name": "top-1 clean", "value": 50.0, "error": 25.0, "low": 15.0, "high": 85.0, "count": 4}
    result = {
        **{"part": "zero-shot", "run": "runs/a", "arm": "AT-5-Avg", "encoder": "mlp:1x2x2-2", "encoder_sha256": "0"},
        **{
            "scores": [score],
            "images": 4,
            "seconds": 1.5,
            "warnings": [],
            "settings": {},
            "details": {"rejected": []},
        },
    }
    file = tmp_path / "zero-shot" / "results.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"arms": [result]}))
    (row,) = write_reports(str(tmp_path), "embedding", [])
    assert row["zero-shot"].score("top-1 clean").count == 4
    entry = {
        **{"name": "clean", "arithmetic": "float32", "reference": None, "target": None, "start_loss": None},
        **{"loss": None, "answer": "a cat", "score": 80, "failure": None, "seconds": 0.5},
    }
    case = {
        **{"image": "a.jpg", "question": "?", "references": ["a cat"], "passes": [entry], "best_reference": 0},
        **{"dropped": False, "tower_sha256": "0"},
    }
    assert CaseRecord.model_validate(case).passes[0].score == 80


def test_an_invalid_case_is_refused(caption: Callable[..., None], tmp_path: Path) -> None:
    caption("own")
    (item,) = tmp_path.rglob("items/*.json")
    item.write_text("{}")
    with refused(DatamergeError, None, f"{item}: "):
        caption("own")


def test_a_missing_package_is_named(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocoevalcap.cider.cider", None)
    for name in ("captions", "cider"):
        monkeypatch.delitem(sys.modules, f"datamerge.evaluation.llava.{name}")
    with refused(ConfigError, None, "pycocoevalcap.cider", "datamerge[eval]"):
        PARTS["captions"].evaluate(load_settings(CaptionsConfig, None, {**settings, "runs": ["own"]}))
