"""The demo's picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image

from datamerge.demo.report import write_report
from datamerge.evaluation import ArmResult, Score
from tests.support.paths import GOLDEN, ROOT


def test_it_shows_groups_curves_and_scores(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5}) + "\n")
    scores = [
        Score(name=f"accuracy {kind}", value=50.0, error=2.0, low=46.0, high=54.0, count=100)
        for kind in ("clean", "robust")
    ]
    arm = ArmResult(
        part="pgd",
        run="run",
        arm="AT-5-Avg",
        encoder="e",
        encoder_sha256="0",
        scores=scores,
        images=100,
        seconds=1.0,
        settings={},
        details={},
    )
    picture = write_report(tmp_path, str(GOLDEN / "v1" / "zarr-uint8_moments-full"), ["run"], [arm])
    with Image.open(picture) as image:
        assert (image.format, image.size) == ("PNG", (1320, 1100))


def test_the_backend_stays_the_users() -> None:
    code = "import sys, datamerge.demo.report; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"
