"""CLIP's towers at full size through the command line, from photos to exported files.

The weights are random and written by open_clip; names, sizes, preprocessing and files are those of the tags. Every
step is compared with open_clip's pipeline. `make slow` runs this test. The time and memory of every stage are written
to the folder that DATAMERGE_REPORTS names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.peak import run
from benchmarks.report import Circumstances, Findings, Table, render
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import open_artifact

pytestmark = pytest.mark.slow

PHOTOS = 16
# The activation of ViT-B-32's tag is not that of the plain model, the mean of ViT-L-14's is not OpenAI's.
TAGS = {"ViT-B-32": "openai", "ViT-L-14": "laion2b_s32b_b82k"}
MERGE = ["--members", "2", "--steps", "1", "--factors", "1", "--keep-clean"]
ARMS: dict[str, list[str]] = {
    "avg": ["--arm", "avg"],
    "factors": ["--arm", "factors", "--grad-checkpointing"],
    "clean and one step": ["--arm", "factors", "--refine", "1", "--grad-checkpointing"],
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Photos of the NIPS 2017 challenge where DATAMERGE_DATA has them, else smooth colours of odd sizes."""
    folder = tmp_path / "photos"
    for name in ("even", "odd"):
        (folder / name).mkdir(parents=True)
    real = sorted((Path(os.environ.get("DATAMERGE_DATA", "")) / "nips17/images").glob("*.png"))
    rng = np.random.default_rng(0)
    for number in range(PHOTOS):
        path = folder / ("odd" if number % 2 else "even") / f"{number:02}.png"
        if os.environ.get("DATAMERGE_DATA") and len(real) >= PHOTOS:
            path.symlink_to(real[number])
            continue
        width, height = (int(side) for side in rng.integers(230, 700, 2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


class OpenClip:
    """Embeddings of photos by open_clip alone."""

    def __init__(self, model: Any, preprocess: Any) -> None:
        self.model, self.preprocess = model.eval(), preprocess

    def pixels(self, paths: list[Path]) -> Tensor:
        """Normalised pixels [B, C, H, W]."""
        return torch.stack([self.preprocess(Image.open(path).convert("RGB")) for path in paths])

    def __call__(self, paths: list[Path]) -> Tensor:
        """Embeddings [B, K], not normalised."""
        with torch.no_grad():
            embeddings: Tensor = self.model.encode_image(self.pixels(paths))
        return embeddings


class Stages:
    """Commands that have run, and the rows of the report."""

    def __init__(self) -> None:
        self.rows: list[list[str]] = []

    def __call__(self, stage: str, *arguments: str | Path) -> str:
        """Run `datamerge ARGUMENTS…`, assert that it succeeds, and return its stdout."""
        command = [sys.executable, "-m", "datamerge", *map(str, arguments)]
        done = run(command, {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"})
        assert done.returncode == 0, f"{stage}: {done.stderr[-3000:]}"
        self.rows.append([stage, f"{done.seconds:.0f}", f"{done.tree:,.0f}", f"{done.process:,.0f}"])
        return done.stdout

    def report(self, model: str, seconds: float, load: float) -> None:
        """Print the table, and write it where DATAMERGE_REPORTS says."""
        where = replace(Circumstances.here("cpu"), missing=())  # this test has no peers
        columns = ("stage", "s", "all its processes, MB", "the largest one, MB")
        found = Findings(tables=[Table(f"{model}, {PHOTOS} photos", columns, self.rows)])
        text = render("full size", found, where, "make slow", seconds, load)
        sys.stderr.write(text)
        if "DATAMERGE_REPORTS" in os.environ:
            Path(os.environ["DATAMERGE_REPORTS"], f"full-size-{model.lower()}.md").write_text(text, "utf-8")


def _original(model: str, tag: str, path: Path) -> OpenClip:
    """A whole CLIP with random weights, in a file as open_clip's training writes it, with the tag's preprocessing."""
    import open_clip

    config = open_clip.get_pretrained_cfg(model, tag)
    name = f"{model}-quickgelu" if config.get("quick_gelu") else model
    torch.manual_seed(0)
    network = open_clip.create_model(name, force_preprocess_cfg=config)
    torch.save({"epoch": 1, "name": "random", "state_dict": network.state_dict()}, path)
    preprocessing = open_clip.transform.PreprocessCfg(**network.visual.preprocess_cfg)
    return OpenClip(network, open_clip.transform.image_transform_v2(preprocessing, is_train=False))


def _close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    assert float((found - expected).abs().max() / expected.abs().max()) <= relative


@pytest.mark.filterwarnings("default")  # libraries warn about themselves
@pytest.mark.parametrize("model", TAGS)
def test_merge_train_evaluate_export_and_reload(tmp_path: Path, photos: Path, model: str) -> None:
    make_torchvision_importable()
    started, load = time.monotonic(), os.getloadavg()[0]
    weights, artifact, stages = tmp_path / "open_clip.pt", tmp_path / "artifact", Stages()
    original = _original(model, TAGS[model], weights)
    spec = f"open_clip:{model}/{TAGS[model]}@{weights}"

    stages("merge", "merge", photos, artifact, "--encoder", spec, *MERGE)
    paths = sorted(photos.rglob("*.png"))[:2]
    _check_artifact(artifact, original, photos)

    # A .pt file that an artifact names is loaded only if `--encoder` names it too.
    settings = ["--encoder", spec, "--steps", "2", "--batch-size", "2"]
    runs = {arm: tmp_path / arm.replace(" ", "-") for arm in ARMS}
    for arm, flags in ARMS.items():
        stages(f"train, {arm}", "train", artifact, runs[arm], *settings, *flags)

    data: list[str | Path] = ["--data", photos, "--limit", "2", "--steps", "1"]
    losses = _clean_losses(json.loads(stages("evaluate", "evaluate", *runs.values(), *data, "--json")))
    names = tmp_path / "names.txt"
    names.write_text("even\nodd\n")
    zero_shot: list[str | Path] = [
        "--class-names",
        names,
        "--templates",
        "simple",
        "--attack",
        "apgd",
        "--epsilons",
        "2/255",
    ]
    stages(
        "evaluate zero-shot", "evaluate", "zero-shot", runs["factors"], *data, *zero_shot, "--no-check-masking",
        "-o", tmp_path / "results",
    )  # fmt: skip

    clean, pixels = original(paths), original.pixels(paths)
    del original
    *_, arm = runs
    tuned = _exported(stages, runs[arm], tmp_path / "export", pixels, paths)
    assert float((tuned - clean).square().sum(1).mean()) == pytest.approx(losses[-1], rel=1e-3)
    stages.report(model, time.monotonic() - started, load)


def _check_artifact(artifact: Path, original: OpenClip, photos: Path) -> None:
    """Targets are open_clip's embeddings of the photos, and clean images its pixels."""
    stored = open_artifact(str(artifact))
    assert len(stored) == PHOTOS
    record = stored[0]
    path = next(path for path in photos.rglob("*.png") if path.stem in record.key)
    assert record.target is not None
    assert record.clean is not None
    _close(torch.from_numpy(record.target)[None], original([path]))
    config = original.model.visual.preprocess_cfg
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    _close((torch.from_numpy(record.clean) / 255 - mean) / std, original.pixels([path])[0])


def _clean_losses(document: dict[str, Any]) -> list[float]:
    return [
        next(score["value"] for score in arm["scores"] if score["name"] == "loss clean") for arm in document["arms"]
    ]


def _exported(stages: Stages, folder: Path, out: Path, pixels: Tensor, paths: list[Path]) -> Tensor:
    """Embeddings of the photos by a run's encoder, exported to and loaded by open_clip and transformers."""
    import open_clip
    from transformers import CLIPVisionModelWithProjection

    stages("export to open_clip", "export-encoder", folder, "--to", "open_clip", "-o", f"{out}-open_clip")
    tuned = OpenClip(*open_clip.create_model_from_pretrained(f"local-dir:{out}-open_clip"))
    embeddings = tuned(paths)
    assert torch.equal(tuned.pixels(paths), pixels)
    del tuned
    stages("export to hf", "export-encoder", folder, "--to", "hf", "-o", f"{out}-hf")
    with torch.no_grad():
        other = CLIPVisionModelWithProjection.from_pretrained(f"{out}-hf")(pixel_values=pixels).image_embeds
    _close(other, embeddings)
    return embeddings
