"""Resamples position embeddings to another grid of patches, as the library of the network does."""

from __future__ import annotations

import math
import re
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


def resampled(library: str, part: nn.Module, name: str, old: Tensor) -> tuple[Tensor, str] | None:
    """Position embeddings resampled for a network of open_clip or transformers; timm's filters do it themselves.

    Args:
        library: library of the network.
        part: the network.
        name: name of the parameter.
        old: values of the parameter for another grid.

    Returns:
        The values in float32, and the description of both grids; None if the library does not resample the tensor.
    """
    if not old.is_floating_point():
        return None
    try:
        if library == "open_clip" and name == "positional_embedding":
            return _open_clip(part, old)
        if library == "transformers" and re.search(r"position_embeddings?(\.weight)?$", name):
            return _hugging_face(part, name, old)
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        # The patches form no square, the width differs, or the tensor is not a plain one.
        return None
    return None


def timm_grids(part: Any, old: Tensor) -> str | None:
    """The old and new grid, if timm resamples position embeddings [1, tokens, width]; else None."""
    grid = getattr(getattr(part, "patch_embed", None), "grid_size", None)
    own = getattr(part, "pos_embed", None)
    if grid is None or own is None or old.ndim != 3 or old.shape == own.shape:
        return None
    tokens = 0 if getattr(part, "no_embed_class", False) else getattr(part, "num_prefix_tokens", 0)
    return _grids(old.shape[1] - tokens, grid)


def _grids(old: int, new: tuple[int, int]) -> str:
    side = math.isqrt(max(old, 0))
    was = f"{side}x{side}" if side * side == old else f"{old}"
    return f"position embeddings from {was} to {new[0]}x{new[1]} patches"


def _open_clip(visual: Any, old: Tensor) -> tuple[Tensor, str]:
    from open_clip.model import resize_pos_embed

    state = {"visual.positional_embedding": old.float()}
    resize_pos_embed(state, SimpleNamespace(visual=visual))
    return state["visual.positional_embedding"], _grids(len(old) - 1, visual.grid_size)


def _hugging_face(part: nn.Module, name: str, old: Tensor) -> tuple[Tensor, str]:
    """Resample with the method that the network uses for other sizes in its forward pass."""
    place, _, attribute = name.removesuffix(".weight").rpartition(".")
    embeddings: Any = deepcopy(part.get_submodule(place))
    new = part.get_parameter(name)
    values = old.float().reshape(-1, old.shape[-1])
    table = nn.Embedding.from_pretrained(values) if name.endswith(".weight") else nn.Parameter(values[None])
    setattr(embeddings, attribute, table)
    config: Any = part.config
    size, patch = _both(config.image_size), _both(config.patch_size)
    grid = size[0] // patch[0], size[1] // patch[1]
    with torch.no_grad():
        result = embeddings.interpolate_pos_encoding(torch.zeros(1, new.shape[-2], old.shape[-1]), *size)
    # Positions beyond the grid belong to other tokens, such as CLIP's class token.
    return result.reshape(new.shape), _grids(len(values) - (new.shape[-2] - grid[0] * grid[1]), grid)


def _both(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)
