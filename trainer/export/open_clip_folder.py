"""Write a folder for open_clip: the fine-tuned image tower, its configuration and, if available, the whole CLIP.

    visual.pt                      state_dict of `model.visual`, which RobustVLM loads
    open_clip_config.json          architecture and preprocessing; `local-dir:` and `hf-hub:` of open_clip read it
    open_clip_model.safetensors    the whole CLIP with the fine-tuned image tower, if its text tower is available
    tokenizer.json, …              if the text tower has a Hugging Face tokeniser

Without open_clip_model.safetensors, open_clip can build the image tower alone, given the path of visual.pt.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from datamerge.encoders import Encoder, parse_spec
from datamerge.encoders.open_clip_models import known_open_clip, of_hub
from datamerge.encoders.specs import HUB, EncoderSpec, split_spec
from datamerge.encoders.text_towers import open_clip_texts
from datamerge.runtime.messages import first_line, warn
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS
from trainer.export.kinds import Folder, check_kind
from trainer.export.same_function import PILLOW, Photo, check_same, check_weights

DEFAULT_SIZE = 224
TOWER, CONFIG, WHOLE = "visual.pt", "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip(encoder: Encoder, origin: str, files: Path) -> Folder:
    """Write an encoder for open_clip.

    Args:
        encoder: the encoder to export.
        origin: spec of the encoder that training started from, which gives the text tower.
        files: an empty folder.

    Raises:
        ConfigError: the encoder is not one of open_clip, or open_clip cannot express its preprocessing or size.
        DatamergeError: the exported files compute other pixels or embeddings.
    """
    check_kind(encoder, "open_clip", "open_clip")
    spec = parse_spec(encoder.spec)
    make_torchvision_importable()
    preprocess = preprocess_config(encoder)
    config = {"model_cfg": _configuration(encoder, spec, preprocess["size"]), "preprocess_cfg": preprocess}
    (files / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    # The file that RobustVLM reads: a plain state_dict, not safetensors.
    torch.save({name: value.contiguous() for name, value in encoder.model.state_dict().items()}, files / TOWER)
    whole = _write_whole(encoder, split_spec(origin), files)
    with _no_log():
        _check(encoder, files, whole)
    if not whole:
        return Folder(TOWER_USAGE, encoder.preprocessing, "There is no text tower in this folder.")
    return Folder(USAGE, encoder.preprocessing, f"The text tower is that of `{origin}`.")


def preprocess_config(encoder: Encoder) -> dict[str, Any]:
    """The encoder's preprocessing as `preprocess_cfg` of open_clip.

    Raises:
        ConfigError: open_clip cannot express the preprocessing.
    """
    own = encoder.preprocessing
    height, width = own.size
    # open_clip's image_transform_v2 rounds to the nearest pixel in these cases.
    rounding = "nearest" if own.resize == "longest" or (own.resize == "shortest" and height != width) else "down"
    able = Preprocessing(
        shape=own.shape, resize=own.resize, interpolation=own.interpolation, rounding=rounding, fill=own.fill[:1]
    )
    problems = own.differences(able)
    if own.resize == "none" or own.interpolation not in ("bicubic", "bilinear") or own.shape[0] != 3:
        problems.append(f"{own.resize}, {own.interpolation}, {own.shape[0]} channels")
    if problems:
        raise ConfigError(
            f"to: open_clip cannot express the preprocessing of {encoder.spec!r} ({problems[0]}); use the run's "
            f"{WEIGHTS}, which datamerge reads"
        )
    return {
        "size": height if height == width else [height, width],
        "mean": list(own.mean or ()),
        "std": list(own.std or ()),
        "interpolation": own.interpolation,
        "resize_mode": own.resize,
        "fill_color": own.fill[0],
    }


def _configuration(encoder: Encoder, spec: EncoderSpec, size: int | list[int]) -> dict[str, Any]:
    """The encoder's architecture as `model_cfg` of open_clip."""
    import open_clip

    of_revision = spec.model.startswith(HUB) and spec.revision
    config: dict[str, Any] = open_clip.get_model_config(of_hub(spec) if of_revision else spec.model)
    vision, native = config["vision_cfg"], config["vision_cfg"].get("image_size", DEFAULT_SIZE)
    # open_clip does not pass the size to timm, so the position embeddings would have timm's default size.
    if "timm_model_name" in vision and native != size and hasattr(encoder.model.trunk, "set_input_size"):
        raise ConfigError(
            f"to: open_clip builds {vision['timm_model_name']} only for an input of {native} pixels, found {size}; "
            f"use the run's {WEIGHTS}, which datamerge reads"
        )
    vision["image_size"] = size
    return config


def _write_whole(encoder: Encoder, origin: EncoderSpec, files: Path) -> bool:
    """Write the whole CLIP if its text tower is available; returns whether it was written."""
    if origin.checkpoint and not Path(origin.checkpoint).is_file():
        origin = replace(origin, checkpoint=None)
    try:
        if not (origin.has_weights or origin.checkpoint):
            raise ConfigError(f"{origin}, the starting encoder, has neither a tag nor a whole checkpoint")
        origin = known_open_clip(origin)
        texts = open_clip_texts(origin, captions=True)
    except ConfigError as error:
        reason = str(error).removeprefix("encoder: ").partition(";")[0]
        warn(
            f"{WHOLE} is not written, since the text tower is not available ({reason}); {TOWER} and {CONFIG} hold "
            "the image tower alone"
        )
        return False
    tower = {f"visual.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    save_file(_apart({**tower, **texts.state_dict()}), files / WHOLE)
    _write_tokenizer(origin, files)
    return True


def _write_tokenizer(origin: EncoderSpec, files: Path) -> None:
    """Write the files of a Hugging Face tokeniser; CLIP's own tokeniser is part of open_clip."""
    import open_clip

    name = open_clip.get_model_config(origin.model)["text_cfg"].get("hf_tokenizer_name")
    try:
        tokenizer = open_clip.get_tokenizer(origin.model)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(files))
    except Exception as error:  # the hub, file formats and tokeniser packages raise many classes
        warn(
            f"the tokeniser {name} is not written, since it is not available ({type(error).__name__}); images need "
            f"none, for texts put its files beside {WHOLE}"
        )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory, which safetensors refuses."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        result[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(tensor.data_ptr())
    return result


def _check(encoder: Encoder, files: Path, whole: bool) -> None:
    import open_clip

    tower = None if whole else str(files / TOWER)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            f"local-dir:{files}", pretrained_image_path=tower
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(
            f"to: open_clip cannot build {encoder.spec!r} from its configuration ({first_line(error)}); use the "
            f"run's {WEIGHTS}, which datamerge reads"
        ) from None
    model.eval()
    check_weights(model.visual, torch.load(files / TOWER, weights_only=True), TOWER)

    def transform(photo: Photo) -> Tensor:
        pixels: Tensor = preprocess(photo)
        return pixels[None]

    def network(pixels: Tensor) -> Tensor:
        embeddings: Tensor = model.encode_image(pixels, normalize=False)
        return embeddings

    check_same(encoder, encoder.preprocessing, transform, network, PILLOW)


@contextmanager
def _no_log() -> Iterator[None]:
    """Silence open_clip's log about a missing text tower, about which `write_open_clip` warns itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


_SHOW = """\
with torch.no_grad():
    embeddings = model.eval().encode_image(preprocess(Image.open("photo.jpg"))[None])  # not normalised
"""
_IMPORTS = "import open_clip\nimport torch\nfrom PIL import Image\n\n"
USAGE = f"""\
{_IMPORTS}model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
{_SHOW}"""
TOWER_USAGE = f"""\
{_IMPORTS}# Without the second argument all weights would be random; those of the text tower are.
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.", pretrained_image_path="visual.pt")
{_SHOW}"""
