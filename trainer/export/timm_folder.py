"""A folder for timm: config.json and model.safetensors, which `local-dir:` and `hf-hub:` of timm read."""

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
    """Write the folder.

    Args:
        encoder: what to export.
        files: an empty folder.

    Raises:
        ConfigError: no encoder of timm, or one whose preprocessing timm has no words for.
        DatamergeError: the files do not compute the same.
    """
    check_kind(encoder, "timm", "timm")
    config = {"pretrained_cfg": data_config(encoder)}
    from timm.models import save_for_hf

    # safetensors takes no other order of memory.
    model: Any = encoder.model
    model.to(memory_format=torch.contiguous_format)
    save_for_hf(model, str(files), model_config=config, safe_serialization=True)
    _check(encoder, files)
    return Folder(USAGE, encoder.preprocessing)


def data_config(encoder: Encoder) -> dict[str, Any]:
    """Preprocessing as timm's `pretrained_cfg` says it, for training and test alike.

    Raises:
        ConfigError: a preprocessing that timm cannot do.
    """
    own = encoder.preprocessing
    scale, size = own.scale[0], own.size[0]
    # timm rounds size / crop_pct down, and floats may come out below the integer.
    crops = (size / side for side in (scale, scale + 0.5))
    crop = next((crop for crop in crops if math.floor(size / crop) == scale), None)
    if own.resize not in CROPS or crop is None:
        raise ConfigError(
            f"to: timm has no words for the preprocessing of {encoder.spec!r} ({own}); use the run's {WEIGHTS}, "
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
