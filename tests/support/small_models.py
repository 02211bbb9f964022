"""Models of open_clip and timm with their names, parts and input sizes, but one layer deep and few channels wide."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

from datamerge.runtime.torchvision_ops import make_torchvision_importable

make_torchvision_importable()

import open_clip as open_clip  # noqa: E402 - it imports torchvision
import open_clip.factory  # noqa: E402 - likewise
import open_clip.timm_model  # noqa: E402 - likewise
import timm as timm  # noqa: E402 - likewise

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
# Prefix of timm's model names → options that make them small.
TOWERS: dict[str, dict[str, Any]] = {
    "vit_pe_core": {"depth": 1},
    "vitamin": {"depth": 1},
    "vit_base_mci": {"depth": 1},
    "vit": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "eva": {"depth": 1, "embed_dim": 32, "num_heads": 2},
    "resnet50": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "fastvit_mci3": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 256)},
    "fastvit_mci4": {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 32, 64, 128, 256)},
    "fastvit": {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128)},
}


def shrink_open_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all models of open_clip small until the test ends."""
    configs = {name: _shrunk(open_clip.get_model_config(name)) for name in open_clip.list_models()}
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", configs)
    shrink_timm(monkeypatch)


def shrink_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all models of timm small until the test ends."""
    create = timm.create_model

    def small(name: str, **options: Any) -> Any:
        fitting = next((prefix for prefix in TOWERS if name.startswith(prefix)), "")
        return create(name, **TOWERS.get(fitting, {}) | options)

    monkeypatch.setattr(timm, "create_model", small)


def _shrunk(config: dict[str, Any]) -> dict[str, Any]:
    small = deepcopy(config)
    vision, text = small["vision_cfg"], small["text_cfg"]
    small["embed_dim"] = 32 if vision.get("timm_proj") in (None, "none") else 24
    if isinstance(vision.get("layers"), list):
        vision |= {"layers": [1, 1, 1, 1], "width": 8}
    elif "layers" in vision:
        width = vision.get("head_width", 64)
        vision |= {"layers": 1, "width": width}
    # open_clip decides by these keys whether the text tower is a separate module.
    custom = bool(small.get("custom_text") or "hf_model_name" in text)
    small |= {"custom_text": custom, "text_cfg": dict(TEXT)}
    if "multimodal_cfg" in small:
        small["multimodal_cfg"] |= {"width": 8, "heads": 1, "layers": 1}
        small["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    return small


def shaken(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The network in eval mode, with weights unlike any initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.02 * torch.rand(tensor.shape, generator=generator) - 0.01)
    return model.eval()
