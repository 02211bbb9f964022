"""A folder for open_clip: the tuned image tower, its configuration and preprocessing, and the CLIP around it.

visual.pt                      state_dict of `model.visual`: what RobustVLM and LLaVA's evaluation load
open_clip_config.json          architecture and preprocessing; `local-dir:` and `hf-hub:` of open_clip read it
open_clip_model.safetensors    the whole CLIP with the tuned image tower, where there is its text tower
tokenizer.json, …              where the text tower has a tokeniser of Hugging Face
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from datamerge.encoders import Encoder, parse_spec
from datamerge.encoders.specs import EncoderSpec
from datamerge.runtime.messages import first_line, warn
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.run import WEIGHTS
from trainer.export.same_function import PILLOW, check_same, check_weights

TOWER, CONFIG, WHOLE = "visual.pt", "open_clip_config.json", "open_clip_model.safetensors"


def write_open_clip(encoder: Encoder, text_tower: str, files: Path) -> str:
    """Write the folder.

    Args:
        encoder: what to export.
        text_tower: spec of the network whose text tower belongs to it.
        files: an empty folder.

    Returns:
        Lines of Python that load it.

    Raises:
        ConfigError: no encoder of open_clip, or one whose preprocessing or size open_clip has no words for.
        DatamergeError: the files do not compute the same.
    """
    spec = parse_spec(encoder.spec)
    if spec.kind != "open_clip":
        raise ConfigError(
            f"to: open_clip expects an open_clip encoder, found {encoder.spec!r}; use the run's {WEIGHTS} itself"
        )
    preprocess = preprocess_config(encoder)
    # The file that RobustVLM reads: a plain state_dict, not safetensors.
    torch.save({name: value.contiguous() for name, value in encoder.model.state_dict().items()}, files / TOWER)
    with _no_log():
        whole = _write_whole(encoder, spec, text_tower, files, preprocess)
        _check(encoder, files, whole)
    return USAGE if whole else TOWER_USAGE


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
            f"{WEIGHTS} itself"
        )
    return {
        "size": height if height == width else [height, width],
        "mean": list(own.mean or ()),
        "std": list(own.std or ()),
        "interpolation": own.interpolation,
        "resize_mode": own.resize,
        "fill_color": own.fill[0],
    }


def _write_whole(
    encoder: Encoder, spec: EncoderSpec, text_tower: str, files: Path, preprocess: dict[str, Any]
) -> bool:
    """The configuration, and the CLIP around the tower if its text tower is there; returns whether it is."""
    import open_clip

    other = parse_spec(text_tower)
    # Of two names the encoder's is the resolved one: with the activation of its weights.
    name = other.model if other.whole else spec.model
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["image_size"] = preprocess["size"]
    (files / CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2) + "\n")
    model, reason = _around(encoder, name, other)
    if model is None:
        warn(
            f"to: {WHOLE} is not written, because there is no text tower for {encoder.spec!r} ({reason}); {TOWER} "
            f"and {CONFIG} are the image tower alone"
        )
        return False
    save_file(_apart(model.state_dict()), files / WHOLE)
    if config["text_cfg"].get("hf_tokenizer_name"):
        try:
            open_clip.get_tokenizer(name).save_pretrained(str(files))
        except Exception as error:  # of the hub, of tokenisers and of the packages that they need
            warn(
                f"to: the tokeniser of {name} is not written ({first_line(error)}); put its files into the folder "
                "before you use the text tower"
            )
    return True


def _around(encoder: Encoder, name: str, text_tower: EncoderSpec) -> tuple[nn.Module | None, str]:
    """The CLIP with the encoder as its image tower, or why there is none."""
    import open_clip

    # A file may be a whole CLIP or its image tower; then the text tower is that of the tag.
    weights = [text_tower.checkpoint, text_tower.pretrained, parse_spec(encoder.spec).pretrained]
    reason = "neither tag nor whole checkpoint of what it was trained from is known"
    for source in [None] if text_tower.whole else dict.fromkeys(filter(None, weights)):
        try:
            model: Any = open_clip.create_model(
                name, source, force_image_size=encoder.preprocessing.size, require_pretrained=True
            )
            model.visual.load_state_dict(encoder.model.state_dict())
        except Exception as error:  # of the hub, of files of weights, of other architectures
            reason = first_line(error)
        else:
            return model, ""
    return None, reason


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
            f"run's {WEIGHTS} itself"
        ) from None
    model.eval()
    check_weights(model.visual, torch.load(files / TOWER, weights_only=True), TOWER)

    def transform(photo: Image.Image) -> Tensor:
        pixels: Tensor = preprocess(photo)
        return pixels[None]

    def network(pixels: Tensor) -> Tensor:
        embeddings: Tensor = model.encode_image(pixels, normalize=False)
        return embeddings

    check_same(encoder, encoder.preprocessing, transform, network, PILLOW)


@contextmanager
def _no_log() -> Iterator[None]:
    """open_clip logs what is missing as it tries; what matters is said here, once."""
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
