"""The arithmetic of evaluations: scores in float32, and TF32 only in the search."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamerge.evaluation import EvaluateConfig, evaluate
from datamerge.evaluation.config import EmbeddingConfig, ZeroShotConfig
from datamerge.evaluation.embedding import evaluate_embedding
from datamerge.evaluation.zero_shot import evaluate_zero_shot
from tests.support.recorder import SPEC, recording

KINDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "everything": lambda values: evaluate(
        EvaluateConfig.model_validate({k: values[k] for k in values if k != "output"})
    ),
    "embedding": lambda values: evaluate_embedding(
        EmbeddingConfig.model_validate({k: values[k] for k in values if k != "head"})
    ),
    "zero-shot": lambda values: evaluate_zero_shot(ZeroShotConfig.model_validate(values)),
}


@pytest.mark.parametrize("precision", ["float32", "tf32"])
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_computed_alike_clean_and_under_attack(
    make_run: Callable[..., str], make_head: Callable[..., str], tmp_path: Path, kind: str, precision: str
) -> None:
    """Otherwise they would be those of two encoders that differ in the third digit."""
    rng = np.random.default_rng(0)
    for index in range(4):
        path = tmp_path / f"photos/{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(path)
    head = make_head(rng.normal(size=(2, 6)).tolist(), ("0", "1"))
    values = {
        "runs": [make_run(SPEC, SPEC)],
        "data": str(tmp_path / "photos"),
        "output": str(tmp_path / "out"),
        "steps": 2,
        "precision": precision,
    }
    with recording() as notes:
        KINDS[kind]({**values, "head": head})
    _, *measured = notes  # the first pass finds the width of the embedding when the encoder is loaded
    assert {note.backward for note in measured} == {False, True}
    assert all(note.deterministic and note.products == "highest" for note in measured)
    search = [note for note in measured if note.backward]
    assert {note.tf32 for note in search} == {precision == "tf32"}
    # The first pass scores the clean images, and the last the adversarial ones.
    assert not measured[0].tf32
    assert not measured[-1].tf32
