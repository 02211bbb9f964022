"""Detects the activation that CLIP weights were trained with: GELU, or OpenAI's approximation of it, QuickGELU.

Names and shapes of the weights are the same for both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from datamerge.encoders.clip_names import HF_MARK
from datamerge.encoders.weight_files import Contents
from datamerge.encoders.weight_readings import Network

# A buffer of OpenAI's archives, and of state_dicts made from them.
_OPENAI_MARK = "input_resolution"


def is_openai(contents: Contents) -> bool:
    """Whether a file holds OpenAI's weights in the form in which OpenAI published them."""
    return any(_OPENAI_MARK in state for state in contents.states.values())


def quick_gelu(path: Path, contents: Contents) -> bool | None:
    """Whether a file, or the transformers configuration beside it, implies QuickGELU; None if neither tells."""
    if is_openai(contents):
        return True
    if not any(name.endswith(HF_MARK) for state in contents.states.values() for name in state):
        return None
    try:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
        vision = config.get("vision_config", config)
        # The default of CLIP's configuration.
        activation = vision.get("hidden_act", "quick_gelu")
    except (OSError, ValueError, AttributeError):
        return None
    of_clip = str(config.get("model_type", "")).startswith("clip")
    return {"quick_gelu": True, "gelu": False}.get(activation) if of_clip else None


def has_quick_gelu(model: nn.Module) -> bool | None:
    """Whether a vision transformer of CLIP computes QuickGELU; None for other networks."""
    network = Network(model)
    part: Any = network.part
    if (network.library, network.kind) == ("open_clip", "VisionTransformer"):
        return type(part.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    config = getattr(part, "config", None) if network.library == "transformers" else None
    activation = getattr(config, "hidden_act", None) if network.kind.startswith("CLIP") else None
    return {"quick_gelu": True, "gelu": False}.get(str(activation))
