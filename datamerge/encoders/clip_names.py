"""Converts CLIP's vision transformer between the names of open_clip and of transformers' CLIPVisionModel."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Name in open_clip below transformer.resblocks.N → name in transformers below encoder.layers.N
_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
# Name in open_clip at the top of the network → name in transformers below `vision_model.`
_TOP = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    # transformers has this spelling.
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
_LAYERS, _HF_LAYERS = "transformer.resblocks.", "encoder.layers."
VISION, PROJECTION = "vision_model.", "visual_projection.weight"
# A name that only transformers' vision models have, and one that only open_clip's have.
HF_MARK, OPEN_CLIP_MARK = _TOP["conv1.weight"], "conv1.weight"


def to_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of open_clip to CLIPVisionModelWithProjection's names; unknown names stay."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "proj":
            # open_clip multiplies by the matrix from the right, a Linear layer by its transpose.
            result[PROJECTION] = tensor.T.contiguous()
        elif name in _TOP:
            result[VISION + _TOP[name]] = tensor
        elif name.startswith(_LAYERS):
            result.update(_layer_to_hf(name, tensor))
        else:
            result[name] = tensor
    return result


def _layer_to_hf(name: str, tensor: Tensor) -> dict[str, Tensor]:
    index, _, rest = name.removeprefix(_LAYERS).partition(".")
    prefix = f"{VISION}{_HF_LAYERS}{index}"
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.rpartition("_")[2]
        pieces = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{prefix}.self_attn.{letter}_proj.{kind}": piece.contiguous() for letter, piece in pieces}
    module, _, kind = rest.rpartition(".")
    return {f"{prefix}.{_LAYER.get(module, module)}.{kind}": tensor}


def from_hf(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_hf`, for names with or without `vision_model.`; unknown names stay."""
    top = {theirs: ours for ours, theirs in _TOP.items()}
    result: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        name = full.removeprefix(VISION)
        if name == PROJECTION:
            result["proj"] = tensor.T
        elif name in top:
            # Some exports of CLIP keep the class token as [1, 1, width].
            result[top[name]] = tensor.flatten() if name.endswith("class_embedding") else tensor
        elif name.startswith(_HF_LAYERS):
            index, _, rest = name.removeprefix(_HF_LAYERS).partition(".")
            _layer_from_hf(f"{_LAYERS}{index}", rest, tensor, result, joined)
        else:
            result[full] = tensor
    for name, pieces in joined.items():
        if pieces.keys() == set("qkv"):
            result[name] = torch.cat([pieces[letter] for letter in "qkv"])
    return result


def _layer_from_hf(
    prefix: str, rest: str, tensor: Tensor, result: dict[str, Tensor], joined: dict[str, dict[str, Tensor]]
) -> None:
    layer = {theirs: ours for ours, theirs in _LAYER.items()}
    module, _, kind = rest.rpartition(".")
    if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj") and kind in ("weight", "bias"):
        joined.setdefault(f"{prefix}.attn.in_proj_{kind}", {})[module[len("self_attn.")]] = tensor
    else:
        result[f"{prefix}.{layer.get(module, module)}.{kind}"] = tensor
