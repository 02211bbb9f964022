"""Builds the image towers of open_clip's models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datamerge.encoders.building import Built, adapted, differing, downloading, input_size, resampled, unknown
from datamerge.encoders.specs import HUB, LOCAL, EncoderSpec
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

CONFIGURATION = "open_clip_config.json"
QUICK = "-quickgelu"  # suffix of the names of models with QuickGELU
# A tiny text tower in place of the real one, which would take half of the memory, or a configuration from the hub.
NO_TEXT = {"context_length": 8, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """The image tower of an open_clip model, with open_clip's preprocessing."""
    spec = known_open_clip(spec)
    import open_clip

    size = input_size(spec, recorded)
    tag, doubts = _of_tags(spec) if not spec.whole else ({}, [])
    place = downloading(spec, lambda: _place(spec))
    visual = downloading(spec, lambda: _create(spec, place, size, tag)).visual
    # CoCa would also return the patches, for its captions.
    visual.output_tokens = False
    own = _read(visual.preprocess_cfg, spec)
    notes: list[str] = []
    if size is not None and not spec.checkpoint and _has_positions(visual):
        native = _pair(open_clip.get_model_config(place)["vision_cfg"]["image_size"])
        notes = resampled(spec, native, size, "open_clip")
    return Built(visual, adapted(recorded, own, size), spec, notes, doubts if recorded is None else [])


def known_open_clip(spec: EncoderSpec) -> EncoderSpec:
    """Check model and tag, and add `-quickgelu` to the model's name if its weights were trained with it.

    OpenAI's and a few other weights need QuickGELU. For the plain name open_clip only warns and uses GELU; and in a
    spec of fine-tuned weights only the model's name tells the activation.

    Raises:
        ConfigError: the model or tag is unknown.
    """
    make_torchvision_importable()
    import open_clip

    if spec.whole:
        return spec
    known = open_clip.list_models()
    if spec.model not in known:
        # Papers write the patch size after a slash (ViT-B/32), where a tag begins in a spec.
        on_paper = f"{spec.model}-{spec.pretrained}".replace("/", "-")
        fitting = max((name for name in known if f"{on_paper}-".startswith(f"{name}-")), key=len, default=None)
        if fitting is not None:
            tag = on_paper.removeprefix(fitting).replace("-", "/", 1)
            raise ConfigError(
                f"encoder: unknown open_clip model {spec.model!r}; expected open_clip:{fitting}{tag}, found '{spec}'"
            )
        raise unknown("open_clip model", spec.model, known)
    if spec.pretrained and not open_clip.is_pretrained_cfg(spec.model, spec.pretrained):
        raise unknown(
            f"weights of open_clip {spec.model}", spec.pretrained, open_clip.list_pretrained_tags_by_model(spec.model)
        )
    quick = f"{spec.model}{QUICK}"
    config = open_clip.get_pretrained_cfg(spec.model, spec.pretrained) if spec.pretrained else {}
    return replace(spec, model=quick) if config.get("quick_gelu") and quick in known else spec


def _place(spec: EncoderSpec) -> str:
    """The name or folder of the model for open_clip."""
    return of_hub(spec) if spec.model.startswith(HUB) and (spec.revision or spec.checkpoint) else spec.model


def _create(spec: EncoderSpec, place: str, size: tuple[int, int] | None, tag: Mapping[str, Any]) -> Any:
    """The model with its weights; if the spec names a file, without weights and text tower."""
    import open_clip

    options: dict[str, Any] = {"force_preprocess_cfg": tag}
    if size is not None:
        options["force_image_size"] = size[0] if size[0] == size[1] else size
    if spec.checkpoint:
        return open_clip.create_model(place, load_weights=False, text_cfg=NO_TEXT, **options)
    if spec.whole:
        return open_clip.create_model(place, require_pretrained=True, **options)
    if not spec.pretrained and "hf_model_name" in open_clip.get_model_config(spec.model)["text_cfg"]:
        options["text_cfg"] = NO_TEXT
    return open_clip.create_model(place, pretrained=spec.pretrained, **options)


def of_hub(spec: EncoderSpec) -> str:
    """Download a model of the hub at its revision, which open_clip does not support; returns its folder.

    If the spec names a file, the weights are not downloaded.
    """
    from open_clip import factory

    repository = spec.model.removeprefix(HUB)
    configuration = factory.download_pretrained_from_hf(repository, CONFIGURATION, revision=spec.revision)
    if not spec.checkpoint:
        factory.download_pretrained_from_hf(repository, revision=spec.revision)
    return f"{LOCAL}{Path(configuration).parent}"


def _of_tags(spec: EncoderSpec) -> tuple[Mapping[str, Any], list[str]]:
    """open_clip's configuration of the tag, else the most common one of the model, with a warning if they differ."""
    import open_clip

    if spec.pretrained:
        return open_clip.get_pretrained_cfg(spec.model, spec.pretrained), []
    # Tags may be listed under the plain name and under that with -quickgelu.
    names = {spec.model, f"{spec.model}{QUICK}"}
    configs = {
        tag: (open_clip.get_pretrained_cfg(model, tag), model)
        for model, tag in open_clip.list_pretrained()
        if model in names
    }
    if not configs:
        return {}, []
    facts = {tag: _facts(config, _quick(model, config)) for tag, (config, model) in configs.items()}
    pixels = {tag: tuple(words.values())[:-1] for tag, words in facts.items()}
    common = max(pixels, key=lambda tag: list(pixels.values()).count(pixels[tag]))
    taken = configs[common][0]
    doubts = differing(spec, _facts(taken, _quick(spec.model, {})), facts) if spec.checkpoint else []
    return taken, doubts


def _facts(config: Mapping[str, Any], quick: bool) -> dict[str, str]:
    """The properties in which tags of one model may differ, in words."""
    words = {name: f"({', '.join(f'{value:g}' for value in config[name])})" for name in ("mean", "std")}
    return {
        **words,
        "resize": config["resize_mode"],
        "interpolation": config["interpolation"],
        "activation": "QuickGELU" if quick else "GELU",
    }


def _quick(model: str, tag: Mapping[str, Any]) -> bool:
    import open_clip

    return bool(tag.get("quick_gelu") or open_clip.get_model_config(model).get("quick_gelu"))


def _read(config: Mapping[str, Any], spec: EncoderSpec) -> Preprocessing:
    """The preprocessing of open_clip's configuration, as `open_clip.image_transform` interprets it."""
    size = _pair(config["size"])
    resize, interpolation = config["resize_mode"], config["interpolation"]
    # For inputs that are not square, open_clip always resizes with bicubic interpolation.
    by_ratio = resize == "longest" or (resize == "shortest" and size[0] != size[1])
    if interpolation == "random" or (by_ratio and resize == "shortest"):
        interpolation = "bicubic"
    record = {
        "shape": (3, *size),
        "resize": resize,
        "interpolation": interpolation,
        "rounding": "nearest" if by_ratio else "down",
        "fill": (config["fill_color"],),
        **{name: _each(config[name]) for name in ("mean", "std")},
    }
    return Preprocessing.read(record, f"encoder: '{spec}'")


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return int(height), int(width)


def _each(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _has_positions(visual: Any) -> bool:
    """Whether the tower has position embeddings, which open_clip resamples for another size."""
    return hasattr(getattr(visual, "trunk", visual), "set_input_size") or hasattr(visual, "positional_embedding")
