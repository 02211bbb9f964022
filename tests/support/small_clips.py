"""Small CLIPs of open_clip, and files of their weights as other libraries write them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from datamerge.runtime.torchvision_ops import make_torchvision_importable

NAME = "small-clip"
# Two layers of the architecture of ViT-B-32, B-16 and L-14: 32 x 32 pixels in 16 patches.
TOWER = {"image_size": 32, "layers": 2, "width": 128, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 64, "heads": 1, "layers": 1}
EMBEDDING = 24


def add_models(folder: Path, models: dict[str, dict[str, Any]]) -> None:
    """Register configurations with open_clip; each lists its differences from the small CLIP, `vision_cfg` by key."""
    make_torchvision_importable()
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    for name, config in models.items():
        vision = {**TOWER, **config.get("vision_cfg", {})}
        if "timm_model_name" in vision:
            vision = config["vision_cfg"]
        whole = {"embed_dim": EMBEDDING, "text_cfg": TEXT, **config, "vision_cfg": vision}
        (folder / f"{name}.json").write_text(json.dumps(whole))
    open_clip.add_model_config(folder)


def small_clip(name: str = NAME, seed: int = 1) -> Any:
    """A CLIP of open_clip whose weights are all random, even those that are initialised to zero or one."""
    make_torchvision_importable()
    import open_clip

    return scrambled(open_clip.create_model(name), seed)


def scrambled(model: Any, seed: int = 1) -> Any:
    """The network in eval mode with noise on all weights, so that a swapped or forgotten weight is noticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                # Small and positive, so that variances stay positive and outputs of deep networks finite.
                tensor += 0.02 * torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
    return model.eval()


def openai_archive(model: Any, path: Path) -> None:
    """Save a TorchScript archive like OpenAI's: the whole CLIP in float16, with its sizes as buffers."""
    from open_clip.model import convert_weights_to_fp16

    convert_weights_to_fp16(model)
    # In OpenAI's CLIP the mask is no buffer.
    del model.attn_mask
    model.attn_mask = None
    sizes = {"input_resolution": TOWER["image_size"], "context_length": 8, "vocab_size": 64}
    for name, size in sizes.items():
        vars(model).pop(name, None)
        model.register_buffer(name, torch.tensor(size))
    inputs = (torch.zeros(1, 3, 32, 32, dtype=torch.float16), torch.zeros(1, 8, dtype=torch.long))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(_InHalf(model), inputs, check_trace=False).model.save(str(path))


class _InHalf(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        return self.model.visual(image)  # type: ignore[no-any-return]
