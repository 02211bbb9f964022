"""Class heads: linear or cosine, from bytes and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from datamerge.encoders import Head, head_from_arrays, load_encoder, load_head, save_encoder
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.schema.head import parse_head
from tests.support.refusals import refused
from tests.support.runs import write_run


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("biased", [False, True])
def test_a_linear_head(biased: bool) -> None:
    weight, bias, embeddings = _random(3, 6), _random(3), _random(5, 6)
    expected = torch.stack(
        [torch.stack([row @ w + (bias[i] if biased else 0.0) for i, w in enumerate(weight)]) for row in embeddings]
    )
    torch.testing.assert_close(Head(weight, bias if biased else None)(embeddings), expected)


def test_a_cosine_head_computes_scaled_cosines() -> None:
    weight, embeddings, scale = _random(3, 6), _random(5, 6), 100.0
    unit = weight / weight.norm(dim=1, keepdim=True)
    logits = Head(unit, scale=torch.tensor([scale]))(embeddings)
    for b, row in enumerate(embeddings):
        for k, w in enumerate(weight):
            cosine = torch.dot(row, w) / (row.norm() * w.norm())
            assert logits[b, k].item() == pytest.approx(scale * cosine.item(), rel=1e-4, abs=1e-4)
    torch.testing.assert_close(Head(unit, scale=torch.tensor([scale]))(7 * embeddings), logits)


def test_a_head_is_never_trained() -> None:
    head = Head(torch.nn.Parameter(_random(3, 6)), torch.nn.Parameter(_random(3)), torch.nn.Parameter(_random(1)))
    assert list(head.parameters()) == []
    embeddings = _random(2, 6).requires_grad_()
    head(embeddings).sum().backward()
    assert embeddings.grad is not None


@pytest.mark.parametrize("bias", [None, _random(3)])
@pytest.mark.parametrize("scale", [None, torch.tensor([14.3])])
@pytest.mark.parametrize("names", [[], ["cat", "Löwe", 'quote " and, comma']])
def test_bytes_round_trip(tmp_path: Path, bias: Tensor | None, scale: Tensor | None, names: list[str]) -> None:
    head = Head(_random(3, 6), bias, scale, names)
    path = tmp_path / "head.safetensors"
    path.write_bytes(head.to_bytes())
    assert path.read_bytes() == Head(_random(3, 6), bias, scale, names).to_bytes()
    for copy in (load_head(str(path)), head_from_arrays(*parse_head(head.to_bytes(), "here"))):
        assert copy.names == names
        assert copy.state_dict().keys() == head.state_dict().keys()
        for name, tensor in head.state_dict().items():
            assert torch.equal(copy.state_dict()[name], tensor)
        assert torch.equal(copy(_random(2, 6)), head(_random(2, 6)))


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    path = tmp_path / "head.safetensors"
    path.write_bytes(save({"weight": _random(3, 6).half()}))
    assert load_head(str(path)).weight.dtype == torch.float32


def test_width_is_checked() -> None:
    head = Head(_random(3, 6))
    head.check_width(6)
    with refused(ConfigError, "head", " 7,", "[3, 6]", "here"):
        head.check_width(7, "here")


@pytest.mark.parametrize("spec", ["nowhere.safetensors", "mlp:1x4x4-2", "python:a:b"])
def test_specs_without_a_head_are_refused(spec: str) -> None:
    with refused(ConfigError, "head", f"'{spec}'", ".safetensors"):
        load_head(spec)


@pytest.mark.parametrize(
    ("data", "fact"),
    [
        (b"", " safetensors "),
        (b"text", " safetensors "),
        (save({"weight": torch.zeros(3)}), "{'weight': [3]}"),
        (save({"w": torch.zeros(3, 6)}), "{'w': [3, 6]}"),
        (save({"weight": torch.zeros(3, 6), "bias": torch.zeros(4)}), "bias [3]"),
        (save({"weight": torch.zeros(3, 6), "bias": torch.zeros(1)}), "found [1]"),
        (save({"weight": torch.zeros(3, 6), "bias": torch.zeros(3, 1)}), "found [3, 1]"),
        (save({"weight": torch.zeros(3, 6), "scale": torch.ones(3)}), "scale [1]"),
    ],
)
def test_files_that_are_not_heads_are_refused(tmp_path: Path, data: bytes, fact: str) -> None:
    (tmp_path / "h.safetensors").write_bytes(data)
    with refused(ConfigError, "head", tmp_path / "h.safetensors", fact):
        load_head(str(tmp_path / "h.safetensors"))


def test_arrays_are_copied() -> None:
    weight = np.zeros((2, 3), np.float32)
    head = head_from_arrays({"weight": weight}, [])
    weight[:] = 1
    assert head.weight.sum() == 0


TIMM = "timm:test_resnet"


def test_a_tuned_network_has_the_classifier_of_its_tag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's classifier is used; a file without one, such as a run's, gets that of the tag it was tuned from."""
    make_torchvision_importable()
    import timm

    tagged: Any = timm.create_model("test_resnet", num_classes=1000)
    torch.save(tagged.state_dict(), tmp_path / "tag.pt")
    own = {**tagged.state_dict(), "fc.weight": _random(2, 64), "fc.bias": _random(2)}
    torch.save(own, tmp_path / "own.pt")
    create: Any = timm.create_model

    def from_file(name: str, pretrained: bool = False, **options: Any) -> Any:
        overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "tag.pt")}} if pretrained else {}
        return create(name, pretrained=pretrained, **overlay, **options)

    monkeypatch.setattr(timm, "create_model", from_file)
    tag = f"{TIMM}/r160_in1k"
    assert torch.equal(load_head(tag).weight, tagged.fc.weight)
    assert torch.equal(load_head(f"{tag}@{tmp_path}/own.pt").weight, own["fc.weight"])
    encoder = load_encoder(tag)
    run = tmp_path / "run"
    spec = write_run(run, tag)
    assert spec == f"{tag}@{run}/encoder.safetensors"
    save_encoder(encoder, run / "encoder.safetensors")
    facts = json.loads((run / "run.json").read_text()) | {"preprocessing": encoder.preprocessing.record()}
    (run / "run.json").write_text(json.dumps(facts))
    for text in (spec, str(run), f"{tag}@{shutil.copy(run / 'encoder.safetensors', tmp_path / 'bare.safetensors')}"):
        head = load_head(text)
        assert torch.equal(head.weight, tagged.fc.weight)
        assert head.bias is not None
        assert torch.equal(head.bias, tagged.fc.bias)
    with refused(ConfigError, "head", tmp_path / "bare.safetensors", "fc.weight", f"{TIMM}/TAG"):
        load_head(f"{TIMM}@{tmp_path}/bare.safetensors")


def test_a_folder_that_is_not_a_run_has_no_head(tmp_path: Path) -> None:
    with refused(ConfigError, "head", tmp_path, "run.json"):
        load_head(str(tmp_path))
