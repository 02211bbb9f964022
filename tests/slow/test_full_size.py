"""The whole way of CLIP's towers at their full size, through the command line: what breaks only there, and its memory.

Weights are random, as open_clip initialises and writes them. Their names, sizes, files and preprocessing are those of
the tags. `make slow` runs this; DATAMERGE_REPORTS names a folder for a table of seconds and memory of every stage.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.peak import Ran, run
from benchmarks.report import Circumstances, Findings, Table, render

pytestmark = pytest.mark.slow

PHOTOS = 16
# ViT-L-14's tag has another mean than OpenAI's, ViT-B-32's another activation than the plain model.
TAGS = {"ViT-B-32": "openai", "ViT-L-14": "laion2b_s32b_b82k"}
ARMS = {
    "avg": [],
    "factors": ["--arm", "factors", "--grad-checkpointing"],
    "clean+1": ["--arm", "factors", "--refine", "1", "--grad-checkpointing"],
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of the NIPS 2017 challenge where DATAMERGE_DATA has them, else smooth colours of odd sizes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    real = sorted((Path(os.environ.get("DATAMERGE_DATA", "")) / "nips17/images").glob("*.png"))
    if os.environ.get("DATAMERGE_DATA") and len(real) >= PHOTOS:
        for path in real[:PHOTOS]:
            (folder / path.name).symlink_to(path)
        return folder
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        width, height = (int(side) for side in rng.integers(230, 700, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:02}.jpg", quality=92)
    return folder


class Way:
    """The stages of one model, in a folder of their own.

    Attributes:
        folder: of everything that is written.
        rows: of the report.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[list[str]] = []

    def __call__(self, stage: str, *arguments: str | Path) -> Ran:
        """Run `datamerge ARGUMENTS…`, which has to end well."""
        done = run([sys.executable, "-m", "datamerge", *map(str, arguments)], {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"
        row = [stage, f"{done.seconds:.0f}", f"{done.tree:.0f}", f"{done.process:.0f}"]
        self.rows.append(row)
        print(*row, flush=True)  # noqa: T201 - hours are nothing to wait for in silence
        return done


def _written_by_open_clip(model: str, tag: str, path: Path) -> None:
    """A checkpoint of the whole CLIP with random weights, as open_clip's training writes it."""
    import open_clip

    torch.manual_seed(0)
    network = open_clip.create_model(_name(model, tag))
    torch.save({"epoch": 1, "name": "random", "state_dict": network.state_dict()}, path)


def _name(model: str, tag: str) -> str:
    """The model with the activation that the tag's weights were trained with."""
    import open_clip

    return f"{model}-quickgelu" if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu") else model


def _report(model: str, way: Way, seconds: float, load: float) -> None:
    if not os.environ.get("DATAMERGE_REPORTS"):
        return
    where = Circumstances.here("cpu")
    columns = ("stage", "s", "all processes, MB", "largest process, MB")
    title = f"{model}, {PHOTOS} photos"
    text = render(
        f"full size, {model}", Findings(tables=[Table(title, columns, way.rows)]), where, "make slow", seconds, load
    )
    folder = Path(os.environ["DATAMERGE_REPORTS"])
    (folder / f"full-size-{model}_{where.slug}_{where.day}.md".lower()).write_text(text, "utf-8")
