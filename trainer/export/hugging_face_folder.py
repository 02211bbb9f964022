"""Write a folder for Hugging Face transformers: config.json, model.safetensors and preprocessor_config.json.

An image tower of open_clip becomes a CLIPVisionModelWithProjection; a vision model of transformers keeps its class.
"""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from datamerge.encoders import Encoder
from datamerge.encoders.hugging_face import FILTERS
from datamerge.runtime.messages import say
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, DatamergeError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS
from trainer.export.hf_clip import clip_config, clip_state_dict
from trainer.export.kinds import Folder, check_kind
from trainer.export.same_function import TORCHVISION, Photo, check_same

PREPROCESSOR = "preprocessor_config.json"
VIT = "ViTModel"
# By class of the model: attribute of its output that holds the embedding.
EMBEDDINGS = {"CLIPVisionModelWithProjection": "image_embeds", VIT: "last_hidden_state[:, 0]"}
POOLED = "pooler_output"
# By field of the preprocessing: how transformers differs from open_clip.
OTHERWISE = {
    "offset": "may shift the crop by one pixel if the centre of a photo lies between two pixels",
    "alpha": "puts transparent images on white",
}


def write_hugging_face(encoder: Encoder, files: Path) -> Folder:
    """Write an encoder for transformers.

    Args:
        encoder: the encoder to export.
        files: an empty folder.

    Raises:
        ConfigError: transformers cannot express the network or its preprocessing, or is not installed.
        DatamergeError: the exported files compute other pixels or embeddings.
    """
    kind = check_kind(encoder, "hf", "open_clip", "hf")
    config = clip_config(encoder) if kind == "open_clip" else None
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("to: hf needs the package 'transformers': pip install 'datamerge[export]'")
    # transformers imports torchvision if it is installed.
    make_torchvision_importable()
    from transformers.utils import logging

    logging.disable_progress_bar()
    processor = processor_config(encoder)
    model = _own_model(encoder.model) if config is None else _clip(encoder, config)
    model.save_pretrained(files)
    (files / PREPROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", "utf-8")
    name = type(model).__name__
    _check(encoder, name, files)
    usage = USAGE.replace("CLASS", name).replace("EMBEDDING", EMBEDDINGS.get(name, POOLED))
    return Folder(usage, in_transformers(encoder), _note(encoder))


def _clip(encoder: Encoder, config: dict[str, Any]) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
    missing, unexpected = model.load_state_dict(clip_state_dict(encoder.model), strict=False)
    left = [name for name in [*missing, *unexpected] if not name.endswith("position_ids")]
    if left:
        raise DatamergeError(
            f"transformers: expected CLIP's known parameter names, found {left[0]} in version "
            f"{version('transformers')}; install another version"
        )
    return model


def _own_model(tower: Any) -> Any:
    """The transformers model inside a HuggingFaceTower."""
    from transformers import CLIPVisionModelWithProjection

    if tower.visual_projection is None:
        return tower.vision_model
    model: Any = CLIPVisionModelWithProjection(tower.config)
    model.vision_model, model.visual_projection = tower.vision_model, tower.visual_projection
    return model


def in_transformers(encoder: Encoder) -> Preprocessing:
    """The encoder's preprocessing as transformers does it.

    For open_clip encoders it differs in two points: if the centre of a photo lies between two pixels, the crop is one
    pixel further up or left; and transparent images are put on white.
    """
    decisions = {"offset": "down", "alpha": "white"}
    hugging_face = check_kind(encoder, "hf", "open_clip", "hf") == "hf"
    return encoder.preprocessing if hugging_face else encoder.preprocessing.model_copy(update=decisions)


def processor_config(encoder: Encoder) -> dict[str, Any]:
    """Contents of `preprocessor_config.json` for a CLIPImageProcessor.

    Raises:
        ConfigError: CLIPImageProcessor cannot express the preprocessing.
    """
    own = in_transformers(encoder)
    shortest, cropped = own.resize == "shortest", own.scale != own.size or own.resize == "shortest"
    problems = {
        f"resize {own.resize}": own.resize not in ("shortest", "squash"),
        f"shorter side to {own.scale[0]} x {own.scale[1]}": shortest and own.scale[0] != own.scale[1],
        f"rounding {own.rounding}": shortest and own.rounding != "down",
        f"pixels around {own.scale[0]} x {own.scale[1]}": any(
            scaled < side for scaled, side in zip(own.scale, own.size, strict=True)
        ),
        f"offset {own.offset}": cropped and own.offset != "down",
    }
    present = [problem for problem, is_present in problems.items() if is_present]
    if present:
        raise ConfigError(
            f"to: hf cannot express the preprocessing of {encoder.spec!r} ({present[0]}); use the run's {WEIGHTS}, "
            "which datamerge reads"
        )
    sides = ("height", "width")
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": own.alpha == "white",
        "do_resize": True,
        "size": {"shortest_edge": own.scale[0]} if shortest else dict(zip(sides, own.scale, strict=True)),
        "resample": next(number for number, name in FILTERS.items() if name == own.interpolation),
        "do_center_crop": cropped,
        "crop_size": dict(zip(sides, own.size, strict=True)),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(own.mean or ()),
        "image_std": list(own.std or ()),
    }


def _note(encoder: Encoder) -> str:
    """Sentence on how the preprocessing of transformers differs, which is also printed; empty if it does not."""
    differences = [one.partition(" ")[0] for one in encoder.preprocessing.differences(in_transformers(encoder))]
    if not differences:
        return ""
    note = f"Unlike open_clip, transformers {' and '.join(OTHERWISE[field] for field in differences)}."
    say(note)
    return note


def _check(encoder: Encoder, name: str, files: Path) -> None:
    import transformers

    model: Any = getattr(transformers, name).from_pretrained(files)
    processor: Any = transformers.AutoImageProcessor.from_pretrained(files)
    model.eval()

    def transform(photo: Photo) -> Tensor:
        pixels: Tensor = processor(photo, return_tensors="pt").pixel_values
        return pixels

    def network(pixels: Tensor) -> Tensor:
        output = model(pixel_values=pixels)
        first = output.last_hidden_state[:, 0]
        embeddings: Tensor = first if name == VIT else getattr(output, EMBEDDINGS.get(name, POOLED))
        return embeddings

    check_same(encoder, in_transformers(encoder), transform, network, TORCHVISION)


USAGE = """\
import torch
from PIL import Image
from transformers import AutoImageProcessor, CLASS

model = CLASS.from_pretrained(".")
processor = AutoImageProcessor.from_pretrained(".")
with torch.no_grad():
    output = model(**processor(Image.open("photo.jpg"), return_tensors="pt"))
embeddings = output.EMBEDDING  # not normalised
"""
