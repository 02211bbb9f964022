"""One page of each kind, made from results as the commands store them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from datamerge.demo.report import write_report
from datamerge.evaluation.measures import LabelledBatch
from datamerge.evaluation.pictures import Album
from datamerge.evaluation.reports import write_reports
from datamerge.evaluation.results import ArmResult, Training, rate_score
from datamerge.evaluation.store import ArmFolder
from datamerge.sources import Sample
from datamerge.tools.inspection import preview
from tests.support.paths import GOLDEN

ARTIFACT = str(GOLDEN / "v1" / "zarr-uint8_moments-full")
ARMS = {"w/o AT": (90, 40), "AT-5-Avg": (88, 55), "<b>&AT</b>": (80, 60)}
LOSSES = {"w/o AT": (0.0, 2.0), "AT-5-Avg": (0.5, 3.0), "<b>&AT</b>": (0.5, 1.0)}


def result(part: str, arm: str, folder: Path) -> ArmResult:
    """A result of 100 images, two of them kept as pictures; the attack changed the class of the second."""
    names = ("top-1 clean", "top-1 ε=2/255") if part == "zero-shot" else ("accuracy clean", "accuracy robust")
    scores = [rate_score(name, [i < hits for i in range(100)]) for name, hits in zip(names, ARMS[arm], strict=True)]
    if part == "pgd":
        losses = zip(("loss clean", "loss adv."), LOSSES[arm], strict=True)
        measured = {"error": 0.1, "count": 100}
        scores += [
            scores[0].model_copy(update={"name": name, "value": value, "low": value, "high": value + 0.2, **measured})
            for name, value in losses
        ]
    stored = ArmFolder(str(folder), part, arm, arm)
    pixels = torch.from_numpy(np.random.default_rng(0).random((2, 3, 8, 8), np.float32))
    # The network predicts the second class where the first value of the image is above 0.5.
    linear = nn.Linear(192, 2)
    linear.weight.data = torch.zeros(2, 192)
    linear.weight.data[1, 0] = 10
    linear.bias.data = torch.tensor([5.0, 0.0])
    pixels[:, 0, 0, 0] = 0.45
    moved = pixels[1].clone()
    moved[0, 0, 0] = 0.55
    batch = LabelledBatch(
        nn.Sequential(nn.Flatten(), linear),
        pixels,
        torch.tensor([0, 0]),
        [Sample("a", "a.png", 0), Sample("b", "b.png", 0)],
    )
    pictures = Album(stored, {"a", "b"}, ["tench", "goldfish"]).keep(batch, {1: ("2/255", moved)})
    return ArmResult(
        part=part,
        run=arm,
        arm=arm,
        encoder="mlp:1x2x2-2",
        encoder_sha256="0123456789abcdef" * 4,
        scores=scores,
        images=100,
        seconds=1.5,
        training=None if arm == "w/o AT" else Training(artifact="s3://bucket/a", steps=5, seconds=2.0, bytes=100),
        settings={"epsilon": "2/255", "norm": "linf", "data": "https://example.org/val"},
        details={"folder": str(stored.path), "pictures": pictures},
    )


@pytest.fixture(scope="session")
def evaluation_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reports of two parts and three arms."""
    folder = tmp_path_factory.mktemp("evaluation")
    for part in ("pgd", "zero-shot"):
        write_reports(str(folder), part, [result(part, arm, folder) for arm in ARMS])
    return folder


@pytest.fixture(scope="session")
def demo_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("demo")
    (root / "run").mkdir()
    lines = [json.dumps({"step": step, "loss": 100 / step}) for step in (1, 10, 100)]
    (root / "run" / "log.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(root, ARTIFACT, ["run"], [result("pgd", arm, root / "evaluation") for arm in ARMS])
    assert page == root / "report.html"
    return page.read_text("utf-8")


@pytest.fixture(scope="session")
def preview_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("preview") / "sheet.html"
    CliRunner().invoke(preview, [ARTIFACT, "-o", str(file), "--groups", "2"], catch_exceptions=False)
    return file.read_text("utf-8")
