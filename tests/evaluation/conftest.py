"""Linear encoders and grey images whose losses and accuracies can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from adversarial import Head, load_encoder, save_encoder

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


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Folder of a finished run."""

    def make(encoder: str, original: str, name: str = "my-run", changes: Mapping[str, Any] | None = None) -> str:
        folder = tmp_path / name
        folder.mkdir()
        summary = {
            "encoder": encoder,
            "original": original,
            "arm": "avg",
            "artifact": "somewhere/artifact",
            "steps": 50,
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
