"""A folder for open_clip: the tuned image tower, its configuration and preprocessing, and the CLIP around it.

    visual.pt                      state_dict of `model.visual`: what RobustVLM loads
    open_clip_config.json          architecture and preprocessing; `local-dir:` and `hf-hub:` of open_clip read it
    open_clip_model.safetensors    the whole CLIP with the tuned image tower, where its text tower can be had
    tokenizer.json, …              where the text tower has a tokeniser of Hugging Face

Without the third, open_clip builds the image tower alone, if it is told where the first is.
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
    """Write the folder.

    Args:
        encoder: what to export.
        origin: spec of what it started from, whose text tower belongs to it.
        files: an empty folder.

    Raises:
        ConfigError: no encoder of open_clip, or one whose preprocessing or size open_clip has no words for.
        DatamergeError: the files do not compute the same.
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
    """`preprocess_cfg` of open_clip.

    Raises:
        ConfigError: a preprocessing that open_clip cannot do.
    """
    own = encoder.preprocessing
    height, width = own.size
    # As open_clip's image_transform_v2 chooses its transforms.
    rounding = "nearest" if own.resize == "longest" or (own.resize == "shortest" and height != width) else "down"
    able = Preprocessing(
        shape=own.shape, resize=own.resize, interpolation=own.interpolation, rounding=rounding, fill=own.fill[:1]
    )
    problems = own.differences(able)
    if own.resize == "none" or own.interpolation not in ("bicubic", "bilinear") or own.shape[0] != 3:
        problems.append(f"{own.resize}, {own.interpolation}, {own.shape[0]} channels")
    if problems:
        raise ConfigError(
            f"to: open_clip has no words for the preprocessing of {encoder.spec!r} ({problems[0]}); use the run's "
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
    """`model_cfg` of open_clip."""
    import open_clip

    of_revision = spec.model.startswith(HUB) and spec.revision
    config: dict[str, Any] = open_clip.get_model_config(of_hub(spec) if of_revision else spec.model)
    vision, native = config["vision_cfg"], config["vision_cfg"].get("image_size", DEFAULT_SIZE)
    # open_clip gives timm no size: it makes position embeddings of timm's own.
    if "timm_model_name" in vision and native != size and hasattr(encoder.model.trunk, "set_input_size"):
        raise ConfigError(
            f"to: open_clip has no words for {vision['timm_model_name']} with an input of {size} pixels, its own is "
            f"{native}; use the run's {WEIGHTS}, which datamerge reads"
        )
    vision["image_size"] = size
    return config


def _write_whole(encoder: Encoder, origin: EncoderSpec, files: Path) -> bool:
    """The CLIP around the tower, if its text tower can be had; returns whether it can."""
    if origin.checkpoint and not Path(origin.checkpoint).is_file():
        origin = replace(origin, checkpoint=None)
    try:
        if not (origin.has_weights or origin.checkpoint):
            raise ConfigError(f"neither a tag nor a whole checkpoint is known of what it started from, {origin}")
        origin = known_open_clip(origin)
        texts = open_clip_texts(origin, captions=True)
    except ConfigError as error:
        reason = str(error).removeprefix("encoder: ").partition(";")[0]
        warn(
            f"{WHOLE} is not written, the text tower cannot be had ({reason}); {TOWER} and {CONFIG} are the image "
            "tower alone"
        )
        return False
    tower = {f"visual.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    save_file(_apart({**tower, **texts.state_dict()}), files / WHOLE)
    _write_tokenizer(origin, files)
    return True


def _write_tokenizer(origin: EncoderSpec, files: Path) -> None:
    """The tokeniser's files; CLIP's own is part of open_clip."""
    import open_clip

    name = open_clip.get_model_config(origin.model)["text_cfg"].get("hf_tokenizer_name")
    try:
        tokenizer = open_clip.get_tokenizer(origin.model)
        if hasattr(tokenizer, "save_pretrained"):
            tokenizer.save_pretrained(str(files))
    except Exception as error:  # of the hub, of formats of tokenisers and of packages that read them
        warn(
            f"the tokeniser {name} is not written, it cannot be had ({type(error).__name__}); images need none, for "
            f"texts put its files beside {WHOLE}"
        )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors without memory in common, which safetensors refuses."""
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
    """open_clip logs that an image tower alone lacks a text tower, which is said here."""
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
