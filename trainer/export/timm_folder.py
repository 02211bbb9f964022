"""Write a folder for timm: config.json and model.safetensors, which `local-dir:` and `hf-hub:` of timm read."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamerge.encoders import Encoder
from storage_schemas import ConfigError
from storage_schemas.schema.run import WEIGHTS
from trainer.export.kinds import Folder, check_kind
from trainer.export.same_function import PILLOW, Photo, check_same

CROPS = {"shortest": "center", "squash": "squash", "longest": "border"}


def write_timm(encoder: Encoder, files: Path) -> Folder:
    """Write an encoder for timm.

    Args:
        encoder: the encoder to export.
        files: an empty folder.

    Raises:
        ConfigError: the encoder is not one of timm, or timm cannot express its preprocessing.
        DatamergeError: the exported files compute other pixels or embeddings.
    """
    check_kind(encoder, "timm", "timm")
    config = {"pretrained_cfg": data_config(encoder)}
    from timm.models import save_for_hf

    # safetensors supports no other memory format.
    model: Any = encoder.model
    model.to(memory_format=torch.contiguous_format)
    save_for_hf(model, str(files), model_config=config, safe_serialization=True)
    _check(encoder, files)
    return Folder(USAGE, encoder.preprocessing)


def data_config(encoder: Encoder) -> dict[str, Any]:
    """The encoder's preprocessing as timm's `pretrained_cfg`, the same for training and test.

    Raises:
        ConfigError: timm cannot express the preprocessing.
    """
    own = encoder.preprocessing
    scale, size = own.scale[0], own.size[0]
    # timm rounds size / crop_pct down, and the float quotient may lie just below the integer.
    crops = (size / side for side in (scale, scale + 0.5))
    crop = next((crop for crop in crops if math.floor(size / crop) == scale), None)
    if own.resize not in CROPS or crop is None:
        raise ConfigError(
            f"to: timm cannot express the preprocessing of {encoder.spec!r} ({own}); use the run's {WEIGHTS}, "
            "which datamerge reads"
        )
    return {
        "input_size": list(own.shape),
        "test_input_size": list(own.shape),
        "interpolation": own.interpolation,
        "crop_mode": CROPS[own.resize],
        "crop_pct": crop,
        "test_crop_pct": crop,
        "mean": list(own.mean or ()),
        "std": list(own.std or ()),
    }


def _check(encoder: Encoder, files: Path) -> None:
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.data.transforms_factory import create_transform

    model: Any = timm.create_model(f"local-dir:{files}", pretrained=True)
    transform: Any = create_transform(**resolve_model_data_config(model))

    def pixels_of(photo: Photo) -> Tensor:
        pixels: Tensor = transform(photo)
        return pixels[None]

    check_same(encoder, encoder.preprocessing, pixels_of, model.eval(), PILLOW)


USAGE = """\
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

model = timm.create_model("local-dir:.", pretrained=True).eval()
preprocess = create_transform(**resolve_model_data_config(model))
with torch.no_grad():
    embeddings = model(preprocess(Image.open("photo.jpg"))[None])
"""
