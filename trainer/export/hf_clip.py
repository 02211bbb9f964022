"""Convert open_clip's vision transformer to Hugging Face's CLIPVisionModelWithProjection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from datamerge.encoders import Encoder
from datamerge.encoders.clip_names import to_hf
from storage_schemas import ConfigError


def clip_config(encoder: Encoder) -> dict[str, Any]:
    """Arguments of CLIPVisionConfig for the encoder's network.

    Raises:
        ConfigError: CLIPVisionModelWithProjection cannot express the network; the message names the difference.
    """
    visual: Any = encoder.model
    if type(visual).__name__ != "VisionTransformer" or not hasattr(visual, "transformer"):
        raise _refusal(encoder, f"the network is a {type(visual).__name__}")
    block = visual.transformer.resblocks[0]
    activation = {"QuickGELU": "quick_gelu", "GELU": "gelu"}.get(type(block.mlp.gelu).__name__)
    height, width = encoder.input_shape[1:]
    patch = visual.conv1.kernel_size
    problems = {
        "attentional pooling": getattr(visual, "attn_pool", None) is not None,
        f"{visual.pool_type} pooling": visual.pool_type != "tok",
        "pooling before the last norm": bool(getattr(visual, "final_ln_after_pool", False)),
        "no projection": visual.proj is None,
        "no norm before the layers": not isinstance(visual.ln_pre, nn.LayerNorm),
        "layer scale": not isinstance(block.ls_1, nn.Identity),
        f"the activation {type(block.mlp.gelu).__name__}": activation is None,
        f"{height} x {width} pixels": height != width or patch[0] != patch[1],
        "a patch embedding with a bias": visual.conv1.bias is not None,
        "fixed positions": not isinstance(visual.positional_embedding, nn.Parameter)
        or not visual.positional_embedding.requires_grad,
    }
    present = [problem for problem, is_present in problems.items() if is_present]
    if present:
        raise _refusal(encoder, f"it has {present[0]}")
    hidden = visual.conv1.out_channels
    return {
        "hidden_size": hidden,
        "intermediate_size": block.mlp.c_fc.out_features,
        "projection_dim": visual.proj.shape[1],
        "num_hidden_layers": len(visual.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "num_channels": encoder.input_shape[0],
        "image_size": height,
        "patch_size": patch[0],
        "hidden_act": activation,
        "layer_norm_eps": visual.ln_post.eps,
    }


def clip_state_dict(visual: nn.Module) -> dict[str, Tensor]:
    """Weights of open_clip's `model.visual` under the parameter names of transformers."""
    return to_hf(visual.state_dict())


def _refusal(encoder: Encoder, reason: str) -> ConfigError:
    return ConfigError(
        f"to: hf expects CLIP's own vision transformer, found encoder {encoder.spec!r}: {reason}; "
        'use `to="open_clip"`, or the run\'s encoder.safetensors, which datamerge reads'
    )
