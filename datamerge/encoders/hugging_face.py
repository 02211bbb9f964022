"""Vision models of Hugging Face transformers: CLIP, SigLIP, DINOv2 and ViT.

A model's folder or repository holds `config.json`, `preprocessor_config.json` and weights.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamerge.encoders.building import Built, adapted, downloading, input_size, resampled
from datamerge.encoders.specs import EncoderSpec
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

# `model_type` of a configuration → class of the vision model, which also loads from the weights of a whole model.
CLASSES = {
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2_with_registers": "Dinov2WithRegistersModel",
    "vit": "ViTModel",
}
# Image processors that `Preprocessing` describes completely: resize, crop, rescale, normalise.
PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor", "BitImageProcessor")
PROJECTION = "visual_projection.weight"
FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's constants


class HuggingFaceTower(nn.Module):
    """A vision model: pixels [B, C, H, W] → image embeddings [B, K], as transformers defines them.

    Its tensors have the names of whole CLIP and SigLIP models: `vision_model.…`, `visual_projection.weight`.

    Attributes:
        vision_model: the vision transformer.
        visual_projection: projection into CLIP's joint space with texts, if the model has one.
        config: configuration of the vision model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = model.config
        self.vision_model: nn.Module = getattr(model, "vision_model", model)
        self.visual_projection: nn.Module | None = getattr(model, "visual_projection", None)

    def forward(self, pixels: Tensor) -> Tensor:
        output: Any = self.vision_model(pixel_values=pixels)
        # ViT's pooling layer is rarely trained; classifiers use the first token.
        pooled = output.pooler_output if self.config.model_type != "vit" else output.last_hidden_state[:, 0]
        return cast(Tensor, pooled if self.visual_projection is None else self.visual_projection(pooled))


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """A vision model of transformers, with the preprocessing of its image processor."""
    transformers_for(spec)
    tower = HuggingFaceTower(downloading(spec, lambda: _model(spec)).float())
    own = recorded or downloading(spec, lambda: read_processor(spec))
    native, size = _native(tower), input_size(spec, recorded)
    notes: list[str] = []
    if size is not None and size != native:
        downloading(spec, lambda: resize_tower(tower, size))
        notes = resampled(spec, native, size, "transformers")
    return Built(tower, adapted(own, own, size), spec, notes)


def transformers_for(spec: EncoderSpec) -> Any:
    """Import transformers to read the folder or repository of a spec.

    Raises:
        ConfigError: transformers is not installed, or the folder holds no model.
    """
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(f"encoder: '{spec}' needs the package 'transformers': pip install 'datamerge[hf]'")
    make_torchvision_importable()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if Path(spec.model).is_absolute() and not (Path(spec.model) / "config.json").is_file():
        raise ConfigError(f"encoder: expected the folder of a model with a config.json at {spec.model}, found none")
    return transformers


def _model(spec: EncoderSpec) -> Any:
    """The vision model, with the weights of the folder or repository unless the spec names a file."""
    import transformers

    where: dict[str, Any] = {"revision": spec.revision} if spec.revision else {}
    config = transformers.AutoConfig.from_pretrained(spec.model, trust_remote_code=False, **where)
    name = CLASSES.get(config.model_type)
    if name is None:
        raise ConfigError(
            f"encoder: expected a vision model of transformers ({', '.join(CLASSES)}) at '{spec}', found "
            f"{config.model_type!r}"
        )
    if not getattr(getattr(config, "vision_config", config), "vision_use_head", True):
        raise ConfigError(
            f"encoder: expected a SigLIP with its pooling head at '{spec}', found one without, which has no "
            "embedding of an image; name the model that it was taken from"
        )
    whole, projection = config, getattr(config, "projection_dim", None)
    if config.model_type in ("clip", "siglip"):
        config = config.vision_config
        # The configuration has two widths of the projection; CLIP uses that of the whole model.
        config.projection_dim = projection
    if whole.model_type == "clip_vision_model" and whole.architectures == ["CLIPVisionModel"]:
        name = "CLIPVisionModel"
    options = {"add_pooling_layer": False} if name == "ViTModel" else {}
    if spec.checkpoint:
        return _class(name)._from_config(config, **options)
    model, missing, misshaped = _loaded(name, spec, config, options | where)
    if missing == [PROJECTION] and whole is config and not config.architectures:
        # Only the weights tell which of CLIP's two vision models was saved.
        model, missing, misshaped = _loaded("CLIPVisionModel", spec, config, where)
    if missing or misshaped:
        raise ConfigError(
            f"encoder: expected weights of {name} at '{spec}', found "
            f"{f'no {missing[0]!r}' if missing else f'another shape of {misshaped[0]!r}'} "
            f"({len(missing)} tensors missing, {len(misshaped)} of another shape)"
        )
    return model


def _loaded(name: str, spec: EncoderSpec, config: Any, options: dict[str, Any]) -> tuple[Any, list[str], list[str]]:
    """A model, and the names of its tensors that are missing in the weights, or have another shape there."""
    model, found = _class(name).from_pretrained(
        spec.model, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    return model, sorted(found["missing_keys"]), sorted(key[0] for key in found["mismatched_keys"])


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def read_processor(spec: EncoderSpec) -> Preprocessing:
    """The preprocessing that the model's image processor does.

    Raises:
        ConfigError: there is no processor, or `Preprocessing` cannot describe it.
    """
    import transformers

    where: dict[str, Any] = {"revision": spec.revision} if spec.revision else {}
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(spec.model, trust_remote_code=False, **where)
    except OSError as error:
        if not Path(spec.model).is_absolute():
            raise
        raise ConfigError(
            f"encoder: expected a preprocessor_config.json in {spec.model}, found none that can be read; save the "
            "model's image processor there"
        ) from error
    return _read(processor, spec)


def _read(processor: Any, spec: EncoderSpec) -> Preprocessing:
    name = type(processor).__name__.removesuffix("Fast").removesuffix("Pil")
    size = processor.size
    sides = {key: value for key in ("height", "width", "shortest_edge", "longest_edge") if (value := _of(size, key))}
    crop = _of(processor.crop_size, "height"), _of(processor.crop_size, "width")
    cropped = bool(processor.do_center_crop) and None not in crop
    squashed, shortest = set(sides) == {"height", "width"}, set(sides) == {"shortest_edge"}
    filter_name = FILTERS.get(int(processor.resample)) if processor.resample is not None else None
    if (
        name not in PROCESSORS
        or not processor.do_resize
        or filter_name is None
        or getattr(processor, "do_pad", None)
        or not (squashed or (shortest and cropped))
    ):
        raise ConfigError(
            f"encoder: expected an image processor of '{spec}' that resizes to one size, crops and normalises "
            f"({', '.join(PROCESSORS)}), found {type(processor).__name__} with size {sides}"
        )
    scale = (sides["height"], sides["width"]) if squashed else (sides["shortest_edge"],) * 2
    # Our pixels are levels / 255; another divisor of the processor is folded into mean and deviation.
    gain = 255 * processor.rescale_factor if processor.do_rescale else 255.0
    gain = 1.0 if abs(gain - 1) < 1e-9 else gain
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ((0.0,), (1.0,))
    record = {
        "shape": (3, *(crop if cropped else scale)),
        "resize": "squash" if squashed else "shortest",
        "scale": scale,
        "interpolation": filter_name,
        "offset": "down",
        "alpha": "white" if processor.do_convert_rgb else "drop",
        "mean": tuple(value / gain for value in mean),
        "std": tuple(value / gain for value in std),
    }
    return Preprocessing.read(record, f"encoder: '{spec}'")


def _of(size: Any, key: str) -> int | None:
    value = size.get(key) if isinstance(size, dict) else getattr(size, key, None)
    return None if value is None else int(value)


def _native(tower: HuggingFaceTower) -> tuple[int, int]:
    size = tower.config.image_size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))


def resize_tower(tower: HuggingFaceTower, size: tuple[int, int]) -> None:
    """Resample position embeddings for images of (H, W), as `interpolate_pos_encoding=True` does.

    DINOv2 is left unchanged, as it resamples at every call.
    """
    if tower.config.model_type.startswith("dinov2"):
        return
    embeddings: Any = tower.vision_model.embeddings
    patch = tower.config.patch_size
    grid = size[0] // patch, size[1] // patch
    first = 0 if tower.config.model_type == "siglip_vision_model" else 1  # CLIP and ViT have a class token
    width = tower.config.hidden_size
    with torch.no_grad():
        positions = embeddings.interpolate_pos_encoding(torch.zeros(1, first + grid[0] * grid[1], width), *size)
    tower.config.image_size = size[0] if size[0] == size[1] else list(size)
    if tower.config.model_type == "vit":
        embeddings.position_embeddings = nn.Parameter(positions)
        embeddings.image_size = embeddings.patch_embeddings.image_size = size
        return
    count = positions.shape[1]
    embeddings.position_embedding = nn.Embedding.from_pretrained(positions[0], freeze=False)
    embeddings.image_size = tower.config.image_size
    embeddings.num_patches, embeddings.num_positions = grid[0] * grid[1], count
    embeddings.position_ids = torch.arange(count).expand((1, -1))
