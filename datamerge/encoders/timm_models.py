"""Builds networks of timm without their classifiers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from datamerge.encoders.building import Built, adapted, differing, downloading, input_size, resampled, unknown
from datamerge.encoders.specs import EncoderSpec
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

RESIZES = {"squash": "squash", "border": "longest"}  # crop mode of timm → `Preprocessing.resize`; others: shortest
FACTS = (
    "shape",
    "resize",
    "scale",
    "interpolation",
    "mean",
    "std",
)  # properties in which tags of one model may differ


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """A network of timm without its classifier, with timm's preprocessing."""
    make_torchvision_importable()
    from timm.data.config import resolve_model_data_config

    name = timm_name(spec)
    model = downloading(spec, lambda: _create(name, spec))
    config = resolve_model_data_config(model)
    native, size = tuple(config["input_size"][1:]), input_size(spec, recorded)
    notes: list[str] = []
    if size is not None and size != native:
        resizable = hasattr(model, "set_input_size")
        if not resizable and model.pretrained_cfg.get("fixed_input_size"):
            raise ConfigError(
                f"encoder: expected `image_size={native[0]}` or none for {spec.named}, whose input size is fixed, "
                f"found {size[0]}"
            )
        if resizable:
            downloading(spec, lambda: model.set_input_size(img_size=size))
            notes = resampled(spec, native, size, "timm")
        config = resolve_model_data_config(model, {"input_size": (config["input_size"][0], *size)})
    own = read_config(config, spec)
    return Built(model, adapted(recorded, own, size), spec, notes, [] if recorded else _doubts(spec, own))


def timm_name(spec: EncoderSpec) -> str:
    """Model and tag in the spelling of timm.

    Raises:
        ConfigError: the model or tag is unknown.
    """
    import timm

    if spec.whole:
        return f"{spec.model}@{spec.revision}" if spec.revision else spec.model
    if not timm.is_model(spec.model):
        raise unknown("timm model", spec.model, timm.list_models())
    name = spec.model
    if spec.pretrained and spec.pretrained != "pretrained":
        name = f"{spec.model}.{spec.pretrained}"
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{spec.model}.*")]
        if spec.pretrained not in tags:
            raise unknown(f"weights of timm {spec.model}", spec.pretrained, tags)
    return name


def _create(name: str, spec: EncoderSpec) -> Any:
    import timm

    if spec.whole and not spec.checkpoint:
        # Load with the classifier: without one timm only logs missing tensors instead of failing.
        model: Any = timm.create_model(name, pretrained=True)
        model.reset_classifier(0)
        return model
    return timm.create_model(name, pretrained=bool(spec.pretrained and not spec.checkpoint), num_classes=0)


def _doubts(spec: EncoderSpec, own: Preprocessing) -> list[str]:
    """The warning that a file's preprocessing is assumed from timm's default tag, if other tags differ."""
    if spec.has_weights or not spec.checkpoint:
        return []
    import timm
    from timm.data.config import resolve_data_config

    sized = {"input_size": own.shape} if spec.image_size else {}
    tags = {}
    for name in timm.list_pretrained(f"{spec.model}.*"):
        config: Any = timm.get_pretrained_cfg(name)
        found = read_config(resolve_data_config(sized, pretrained_cfg=config.to_dict()), spec)
        tags[name.partition(".")[2]] = found.words(*FACTS)
    return differing(spec, own.words(*FACTS), tags)


def read_config(config: Mapping[str, Any], spec: EncoderSpec) -> Preprocessing:
    """The preprocessing of timm's configuration, as `timm.data.create_transform` interprets it."""
    shape = tuple(config["input_size"])
    scale = tuple(math.floor(side / config["crop_pct"]) for side in shape[1:])
    resize = RESIZES.get(config["crop_mode"], "shortest")
    by_ratio = resize == "longest" or (resize == "shortest" and scale[0] != scale[1])
    record = {
        "shape": shape,
        "resize": resize,
        "scale": scale,
        "interpolation": config["interpolation"],
        "rounding": "nearest" if by_ratio else "down",
        "fill": tuple(round(255 * value) for value in config["mean"]) if resize == "longest" else (0,),
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    return Preprocessing.read(record, f"encoder: '{spec}'")
