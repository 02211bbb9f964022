"""timm's networks without their classifiers."""

from __future__ import annotations

from datamerge.encoders.building import Built, downloading, unknown
from datamerge.encoders.specs import EncoderSpec
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from storage_schemas.schema.preprocessing import Preprocessing


def build(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """A network of timm, without its classifier."""
    make_torchvision_importable()
    import timm
    from timm.data.config import resolve_model_data_config

    name = timm_name(spec)
    model = downloading(
        spec, lambda: timm.create_model(name, pretrained=bool(spec.pretrained and not spec.checkpoint), num_classes=0)
    )
    config = resolve_model_data_config(model)
    own = Preprocessing(shape=tuple(config["input_size"]), mean=config["mean"], std=config["std"])
    return Built(model, recorded or own, spec)


def timm_name(spec: EncoderSpec) -> str:
    """Model and tag as timm spells them; raises ConfigError for unknown ones."""
    import timm

    if not timm.is_model(spec.model):
        raise unknown("timm model", spec.model, timm.list_models())
    name = spec.model
    if spec.pretrained and spec.pretrained != "pretrained":
        name = f"{spec.model}.{spec.pretrained}"
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{spec.model}.*")]
        if spec.pretrained not in tags:
            raise unknown(f"weights of timm {spec.model}", spec.pretrained, tags)
    return name
