"""Evaluation on a GPU: the CPU's results at any precision of the search; LLaVA without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from datamerge.attacks import APGD, Survival, auto_attack, check_masking, sample_generators
from tests.support.llava import make_llava

Waits = Callable[[Callable[[], object]], list[str]]
KEYS = [str(index) for index in range(64)]


def _classifier() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small convolutional network, and 64 images that it classifies correctly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.GELU(), nn.Flatten(), nn.Linear(128, 10)).eval()
        pixels = torch.rand(64, 3, 16, 16)
    with torch.no_grad():
        return model.requires_grad_(False), pixels, model(pixels).argmax(dim=1)


def _attacked(device: torch.device, precision: str) -> Survival:
    model, pixels, labels = _classifier()
    generators = [sample_generators(0, key, 1)[0] for key in KEYS]
    settings = APGD(Fraction(4, 255), 10, grid=False)
    return auto_attack(
        model.to(device), pixels.to(device), labels.to(device), settings, generators, precision=cast(Any, precision)
    )


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_robust_images_agree_with_the_cpus(device: torch.device, precision: str) -> None:
    expected, found = _attacked(torch.device("cpu"), "float32"), _attacked(device, precision)
    assert found.clean.all()
    assert 0 < int(expected.robust.sum()) < 64
    assert abs(int(found.robust.sum()) - int(expected.robust.sum())) <= (1 if precision == "float32" else 2)


def test_check_masking_accepts_a_mask_on_the_cpu(device: torch.device) -> None:
    model, pixels, labels = _classifier()
    robust = _attacked(device, "float32").robust.cpu()
    settings = APGD(Fraction(4, 255), 3, grid=False)
    check_masking(model.to(device), pixels.to(device), labels.to(device), settings, robust, KEYS, 0)


def test_llava_passes_do_not_wait_for_the_gpu(tmp_path: Path, device: torch.device, waits: Waits) -> None:
    """In half precision and in float32; loading takes little more memory than the weights."""
    from datamerge.evaluation.llava.model import Llava
    from datamerge.evaluation.llava.vision_towers import read_tower_run

    make_llava(tmp_path / "llava", ["What is it?", "a cat", "Where?", "on the roof of a house"])
    run = read_tower_run("own")

    def passes(arithmetic: Any) -> list[torch.Tensor]:
        before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
        llava = Llava(str(tmp_path / "llava"), run, 0, device, arithmetic)
        if device.type == "cuda":
            weights = sum(parameter.nbytes for parameter in llava.model.parameters())
            assert torch.cuda.memory_allocated() - before < 1.5 * weights + 2**20
        tokens = llava.answers(["What is it?", "Where?"], ["a cat", "on the roof of a house"])
        pixels = torch.rand(2, 3, 32, 32, device=device, requires_grad=True)
        gradients: list[torch.Tensor] = []

        def one_pass() -> None:
            gradients.extend(torch.autograd.grad(llava.losses(pixels, tokens).sum(), pixels))

        one_pass()
        assert waits(one_pass) == []
        return gradients

    for arithmetic in ("float16" if device.type == "cuda" else "bfloat16", "float32"):
        assert all(gradient.isfinite().all() for gradient in passes(arithmetic))
