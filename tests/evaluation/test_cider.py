"""CIDEr against pycocoevalcap on real captions, and VQA accuracy against the official script's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from datamerge.evaluation.llava import cider
from datamerge.evaluation.llava.cider import CaptionScorer
from datamerge.evaluation.llava.vqa_accuracy import normalise, vqa_accuracy

GOLDEN = json.loads((Path(__file__).parent / "golden" / "vqa_accuracy.json").read_text())

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="Stanford's tokeniser needs Java")


@pytest.fixture(scope="module")
def references(caption_file: str) -> dict[str, list[str]]:
    """Captions of twenty real images."""
    found: dict[str, list[str]] = {}
    for entry in json.loads(Path(caption_file).read_text())["annotations"]:
        found.setdefault(str(entry["image_id"]), []).append(entry["caption"])
    return dict(list(found.items())[:20])


@pytest.fixture(scope="module")
def predictions(references: dict[str, list[str]]) -> dict[str, str]:
    """Another person's captions, one with odd punctuation, one of another image and an empty one."""
    keys = list(references)
    candidates = {key: references[key][-1] for key in keys}
    return candidates | {
        keys[0]: 'A "dog", isn\'t it? - yes; (brown)...',
        keys[1]: references[keys[2]][0],
        keys[3]: "",
        keys[4]: "A man can't\nwait",
    }


@needs_java
def test_cider_equals_pycocoevalcap(references: dict[str, list[str]], predictions: dict[str, str]) -> None:
    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({key: [{"caption": text} for text in texts] for key, texts in references.items()})
    candidates = tokenizer.tokenize({key: [{"caption": text}] for key, text in predictions.items()})
    mean, each = Cider().compute_score(truth, candidates)
    scorer = CaptionScorer({key: texts[:] for key, texts in references.items()})
    scores = scorer.scores(predictions)
    assert list(scores.values()) == pytest.approx((100 * each).tolist(), abs=1e-9)
    assert sum(scores.values()) / len(scores) == pytest.approx(100 * float(mean))
    some = dict(list(predictions.items())[5:8])
    assert scorer.scores(some) == {key: scores[key] for key in some}, "a score is the image's own"


@needs_java
def test_golden_cider() -> None:
    # Computed with pycocoevalcap 1.2 (PTBTokenizer, then Cider).
    scorer = CaptionScorer(
        {"1": ["a cat on a mat", "the cat sits."], "2": ["a dog runs", "two dogs"], "3": ["a red bus"]}
    )
    scores = scorer.scores({"1": "A cat on a mat.", "2": "a dog", "3": "a bus"})
    assert scores == pytest.approx({"1": 539.41497787, "2": 174.33843498, "3": 174.33843498}, abs=1e-6)


@needs_java
@pytest.mark.parametrize("end", ["\r", "\x0b", "\x85", "\u2028", "\n\n"])
def test_line_separators_within_a_caption_do_not_shift_scores(end: str) -> None:
    """Stanford's tokeniser works by lines; the other captions keep their scores."""
    references = {"1": ["a cat sits"], "2": ["a dog runs"], "3": ["a red bus"]}
    scores = CaptionScorer(references).scores({"1": f"a cat{end}sits", "2": "a dog runs", "3": "a red bus"})
    assert scores == CaptionScorer(references).scores({key: texts[0] for key, texts in references.items()})


@needs_java
def test_an_empty_last_caption_scores_0() -> None:
    scores = CaptionScorer({"1": ["a cat sits"], "2": ["a dog runs"]}).scores({"1": "a cat", "2": ""})
    assert scores["2"] == 0.0


def test_without_java_scores_are_marked(
    references: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    scorer = CaptionScorer(references)
    errors = capsys.readouterr().err
    assert "Java" in errors
    assert "CIDEr" in errors
    assert scorer.tokeniser == cider.PLAIN
    scores = scorer.scores({key: texts[0] for key, texts in references.items()})
    assert min(scores.values()) > 50, "a reference among the references"


@pytest.mark.parametrize("case", GOLDEN, ids=[case["prediction"] for case in GOLDEN])
def test_golden_vqa_accuracy(case: dict[str, object]) -> None:
    prediction, answers = str(case["prediction"]), [str(answer) for answer in list(case["answers"])]  # type: ignore[call-overload]
    assert normalise(prediction) == case["normalised"]
    assert vqa_accuracy(prediction, answers) == pytest.approx(case["accuracy"])


@given(st.lists(st.sampled_from(["yes", "no", "2"]), min_size=10, max_size=10))
def test_vqa_accuracy_is_leave_one_out(answers: list[str]) -> None:
    matches = answers.count("yes")
    expected = (matches * min(1, (matches - 1) / 3) + (10 - matches) * min(1, matches / 3)) / 10
    assert vqa_accuracy("Yes.", answers) == pytest.approx(max(expected, 0))
