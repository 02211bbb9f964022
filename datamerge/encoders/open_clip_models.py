"""open_clip's image towers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from datamerge.encoders.building import Built, downloading, unknown
from datamerge.encoders.specs import EncoderSpec
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from storage_schemas.schema.preprocessing import Preprocessing


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """The image tower of an open_clip model."""
    spec = known_open_clip(spec)
    import open_clip

    model = downloading(
        spec, lambda: open_clip.create_model(spec.model, pretrained=None if spec.checkpoint else spec.pretrained)
    )
    visual: Any = model.visual
    size = visual.image_size if isinstance(visual.image_size, tuple) else (visual.image_size,) * 2
    mean = getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN
    std = getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD
    return Built(visual, recorded or Preprocessing(shape=(3, *size), mean=mean, std=std), spec)


def known_open_clip(spec: EncoderSpec) -> EncoderSpec:
    """The spec, if open_clip knows model and tag, with the activation that the weights were trained with in its name.

    OpenAI's and a few other weights need QuickGELU. Asked for the plain model, open_clip only warns and runs it with
    GELU; and a spec of fine-tuned weights has the model's name alone to say which of the two it is.

    Raises:
        ConfigError: an unknown model or tag.
    """
    make_torchvision_importable()
    import open_clip

    known = open_clip.list_models()
    if spec.model not in known:
        raise unknown("open_clip model", spec.model, known)
    if spec.pretrained and (spec.model, spec.pretrained) not in open_clip.list_pretrained():
        tags = [tag for model, tag in open_clip.list_pretrained() if model == spec.model]
        raise unknown(f"weights of open_clip {spec.model}", spec.pretrained, tags)
    quick = f"{spec.model}-quickgelu"
    config = open_clip.get_pretrained_cfg(spec.model, spec.pretrained) if spec.pretrained else {}
    return replace(spec, model=quick) if config.get("quick_gelu") and quick in known else spec
