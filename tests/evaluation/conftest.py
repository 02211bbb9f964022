"""Linear encoders whose losses can be worked out by hand; a LLaVA and a CLIP small enough for tests."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import datamerge.cli
from datamerge.encoders import Head, load_encoder, save_encoder
from datamerge.evaluation.llava.captions import QUESTION
from datamerge.evaluation.llava.coco import Captioned, read_captions
from datamerge.evaluation.llava.images import read_image
from datamerge.evaluation.llava.model import Llava
from datamerge.evaluation.llava.vision_towers import OWN, read_tower_run
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from tests.support.llava import PATCH, SIZE, WIDTH, make_llava

CLIP = "datamerge-test-clip"
CPU = torch.device("cpu")
MakeEncoder = Callable[[Sequence[Sequence[float]]], str]
MakeRun = Callable[..., str]
MakeHead = Callable[..., str]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def run_command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run `datamerge evaluate …`; returns the exit code."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["datamerge", "evaluate", *arguments])
        try:
            datamerge.cli.main()
        except SystemExit as error:
            return int(error.code or 0)
        return 0

    return run


@pytest.fixture
def make_encoder(tmp_path: Path) -> MakeEncoder:
    """Spec of f(x) = W(2x − 1) on grey 2×2 pixels; one row of W per output."""

    def make(weight: Sequence[Sequence[float]]) -> str:
        spec = f"mlp:1x2x2-{len(weight)}"
        encoder = load_encoder(spec)
        state = {"1.weight": torch.tensor(weight), "1.bias": torch.zeros(len(weight))}
        encoder.model.load_state_dict(state)
        path = tmp_path / f"weights-{len(list(tmp_path.glob('weights-*')))}.safetensors"
        save_encoder(encoder, path)
        return f"{spec}@{path}"

    return make


@pytest.fixture
def overflowing(make_encoder: MakeEncoder) -> str:
    """Spec of an encoder with finite weights whose outputs overflow: pixels are divided by a tiny number."""
    spec = make_encoder([[1e30] * 4])
    encoder = load_encoder(spec)
    encoder.preprocessing = encoder.preprocessing.model_copy(update={"std": (1e-30,)})
    save_encoder(encoder, spec.partition("@")[2])
    return spec


@pytest.fixture
def two_class(make_encoder: MakeEncoder) -> str:
    """Logit 1 − logit 0 = 2·mean(x) − 1: bright images are class 1, dark ones class 0."""
    return make_encoder([[0.0] * 4, [0.25] * 4])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Per class one image 1.5 grey levels from the two_class boundary at 127.5, and one 7.5 levels away."""
    folder = tmp_path / "photos"
    for name, level in {"dark/near": 126, "dark/far": 120, "light/near": 129, "light/far": 135}.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), level).save(path)
    return folder


@pytest.fixture
def make_head(tmp_path: Path) -> MakeHead:
    """File of a linear head."""

    def make(weight: Sequence[Sequence[float]], names: Sequence[str] = ()) -> str:
        path = tmp_path / f"head-{len(list(tmp_path.glob('head-*')))}.safetensors"
        path.write_bytes(Head(torch.tensor(weight), names=names).to_bytes())
        return str(path)

    return make


def _sha256(spec: str) -> str:
    """Hash of an encoder's weights, where they can be read."""
    try:
        return load_encoder(spec).sha256
    except ConfigError:
        return "0" * 64


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Folder of a finished run."""

    def make(encoder: str, original: str, name: str = "my-run", changes: Mapping[str, Any] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        summary = {
            "encoder": encoder,
            "encoder_sha256": _sha256(encoder),
            "original": original,
            "original_sha256": _sha256(original),
            "arm": "avg",
            "artifact": "somewhere/artifact",
            "plan_sha256": "0" * 64,
            "steps": 50,
            "groups": 50,
            "seconds": 12.5,
            "bytes": 3_000_000,
            "config": {},
            "not_known_here": 1,
            **(changes or {}),
        }
        kept = {key: value for key, value in summary.items() if value is not None}
        (folder / "run.json").write_text(json.dumps(kept))
        return str(folder)

    return make


@pytest.fixture(scope="session")
def coco() -> Path:
    """Real COCO images and captions."""
    folder = Path(os.environ.get("DATAMERGE_DATA", "")) / "coco_mini"
    if not os.environ.get("DATAMERGE_DATA") or not folder.is_dir():
        pytest.skip("DATAMERGE_DATA does not name a folder with coco_mini")
    return folder


@pytest.fixture(scope="session")
def caption_file(coco: Path) -> str:
    return str(coco / "annotations" / "captions_val2017.json")


@pytest.fixture(scope="session")
def captioned(coco: Path, caption_file: str) -> list[Captioned]:
    """Four images as the seed chooses them."""
    return read_captions(caption_file, str(coco / "val2017"), "test", 4, 42)


@pytest.fixture(scope="session")
def llava_path(tmp_path_factory: pytest.TempPathFactory, captioned: list[Captioned]) -> str:
    """A LLaVA that has learnt the first captions of the four images by heart."""
    texts = [caption for image in captioned for caption in image.captions]
    path = make_llava(tmp_path_factory.mktemp("llava"), texts)
    llava = Llava(path, read_tower_run(OWN), 0, CPU, "float32")
    pixels = torch.stack([torch.from_numpy(read_image(i.image, llava.preprocessing, "pad")) for i in captioned])
    tokens = llava.answers([QUESTION] * 4, [image.captions[0] for image in captioned])
    llava.model.requires_grad_(True)
    optimizer = torch.optim.Adam(llava.model.parameters(), lr=5e-3)
    for _ in range(70):
        optimizer.zero_grad()
        llava.losses(pixels.float() / 255, tokens).mean().backward()
        optimizer.step()
    llava.model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def llava(llava_path: str) -> Llava:
    return Llava(llava_path, read_tower_run(OWN), 0, CPU, "float32")


@pytest.fixture(scope="session")
def make_clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Spec of a small CLIP of open_clip with random weights; of another width or size if asked."""
    make_torchvision_importable()
    import open_clip

    folder = tmp_path_factory.mktemp("clip")

    def make(width: int = WIDTH, size: int = SIZE) -> str:
        name = f"{CLIP}-{width}-{size}"
        config = {
            "embed_dim": 16,
            "vision_cfg": {"image_size": size, "layers": 3, "width": width, "patch_size": PATCH, "head_width": 16},
            "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        }
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder)
        return f"open_clip:{name}"

    return make
