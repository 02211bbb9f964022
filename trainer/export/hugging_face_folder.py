"""A folder for Hugging Face transformers: config.json, model.safetensors and preprocessor_config.json.

An image tower of open_clip becomes a CLIPVisionModelWithProjection; a vision model of transformers stays what it is.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from datamerge.encoders import Encoder
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS
from trainer.export.hf_clip import clip_config, clip_state_dict
from trainer.export.same_function import TORCHVISION, check_same

PREPROCESSOR = "preprocessor_config.json"


def write_hugging_face(encoder: Encoder, text_tower: str, files: Path) -> str:
    """Write the folder.

    Args:
        encoder: what to export.
        text_tower: not written: these are vision models.
        files: an empty folder.

    Returns:
        Lines of Python that load it.

    Raises:
        ConfigError: a network or a preprocessing that transformers has no words for, or no transformers.
        DatamergeError: the files do not compute the same.
    """
    config = clip_config(encoder)
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("to: hf needs the package 'transformers': pip install 'datamerge[export]'")
    # transformers imports torchvision wherever that is installed.
    make_torchvision_importable()
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    processor = processor_config(encoder)
    model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    missing, unexpected = model.load_state_dict(clip_state_dict(encoder.model), strict=False)
    left = [name for name in [*missing, *unexpected] if not name.endswith("position_ids")]
    if left:
        raise DatamergeError(
            f"this version of transformers ({version('transformers')}) names parameters otherwise: {left[0]}"
        )
    model.save_pretrained(files)
    (files / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    _check(encoder, files)
    return USAGE


def processor_config(encoder: Encoder) -> dict[str, Any]:
    """`preprocessor_config.json` of a CLIPImageProcessor.

    Raises:
        ConfigError: a preprocessing that it cannot do.
    """
    own = encoder.preprocessing
    able = own.model_copy(update={"rounding": "down"})
    problems = [what for what in own.differences(able) if own.resize == "shortest"]
    if own.resize in ("longest", "none"):
        problems.append(f"resize {own.resize}")
    if own.resize == "shortest" and own.scale[0] != own.scale[1]:
        problems.append(f"shorter side to {own.scale[0]} x {own.scale[1]}")
    if any(scaled < side for scaled, side in zip(own.scale, own.size, strict=True)):
        problems.append(f"padding from {own.scale} to {own.size}")
    if problems:
        raise ConfigError(
            f"to: hf has no words for the preprocessing of {encoder.spec!r} ({problems[0]}); use the run's {WEIGHTS} "
            "itself"
        )
    sides = ("height", "width")
    scale = dict(zip(sides, own.scale, strict=True))
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": own.scale[0]} if own.resize == "shortest" else scale,
        "resample": int(Image.Resampling[own.interpolation.upper()]),
        "do_center_crop": own.resize == "shortest" or own.scale != own.size,
        "crop_size": dict(zip(sides, own.size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(own.mean or ()),
        "image_std": list(own.std or ()),
    }


def as_transformers_does(own: Preprocessing) -> Preprocessing:
    """The same preprocessing with two decisions that transformers takes otherwise than the other libraries."""
    return own.model_copy(update={"offset": "down", "alpha": "white"})


def _check(encoder: Encoder, files: Path) -> None:
    from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection.from_pretrained(files)
    model.eval()
    processor: Any = AutoImageProcessor.from_pretrained(files)

    def transform(photo: Image.Image) -> Tensor:
        pixels: Tensor = processor(photo, return_tensors="pt").pixel_values
        return pixels

    def network(pixels: Tensor) -> Tensor:
        embeddings: Tensor = model(pixel_values=pixels).image_embeds
        return embeddings

    check_same(encoder, as_transformers_does(encoder.preprocessing), transform, network, TORCHVISION)


USAGE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

model = CLIPVisionModelWithProjection.from_pretrained(".")
processor = AutoImageProcessor.from_pretrained(".")
with torch.no_grad():
    embeddings = model(**processor(Image.open("photo.jpg"), return_tensors="pt")).image_embeds  # not normalised
"""
