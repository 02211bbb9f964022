"""Class heads: logits from embeddings, read from a file, from a network's classifier or made from class names.

    head.safetensors               weight [classes, K], optional bias [classes], optional scale [1]
    timm:MODEL/PRETRAINED          the classifier of that network (also timm:MODEL@CHECKPOINT)
    open_clip:MODEL/PRETRAINED     zero-shot: the text tower's embeddings of class names (also @CHECKPOINT)

A head with `scale` is CLIP's: embeddings are normalised to length 1 and the logits multiplied by scale.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datamerge.encoders.building import downloading, seeded
from datamerge.encoders.checkpoints import read_state_dict
from datamerge.encoders.open_clip_models import known_open_clip
from datamerge.encoders.specs import KINDS, EncoderSpec, parse_spec, refusals_about
from datamerge.encoders.timm_models import timm_name
from datamerge.encoders.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError
from storage_schemas.artifact import parse_head
from storage_schemas.schema.record import Array


class Head(nn.Module):
    """A linear or cosine classifier; its tensors are buffers, so no optimiser moves them.

    Attributes:
        weight: [classes, K].
        bias: [classes] or None.
        scale: [1] for a cosine classifier, else None.
        names: class names, empty if unknown.
    """

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        scale: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.register_buffer("scale", None if scale is None else scale.detach())
        self.names = list(names)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits [B, classes] of embeddings [B, K]."""
        if self.scale is not None:
            embeddings = nn.functional.normalize(embeddings, dim=-1) * self.scale
        return nn.functional.linear(embeddings, self.weight, self.bias)

    def check_width(self, embedding_dim: int, what: str = "the head") -> None:
        """Raise ConfigError, with what the head is called, unless it takes embeddings of this width."""
        if self.weight.shape[1] != embedding_dim:
            raise ConfigError(
                f"head: expected one for embeddings of width {embedding_dim}, found weight "
                f"{list(self.weight.shape)} in {what}"
            )

    def to_bytes(self) -> bytes:
        """The head as a safetensors file, as in an artifact."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        return save(tensors, metadata={"names": json.dumps(self.names)})


def head_from_arrays(arrays: Mapping[str, Array], names: Sequence[str]) -> Head:
    """A head from `Artifact.head()` or a parsed file."""
    tensors = {name: torch.from_numpy(array.copy()).float() for name, array in arrays.items()}
    return Head(tensors["weight"], tensors.get("bias"), tensors.get("scale"), names)


def load_head(spec: str, class_names: Sequence[str] = (), templates: Sequence[str] = ()) -> Head:
    """Load a head from a file or spec (forms in the module's docstring).

    Args:
        spec: a path ending in .safetensors, or an encoder spec.
        class_names: needed by open_clip specs: the classes in label order.
        templates: prompts of open_clip specs with {} for the name; OpenAI's 80 for ImageNet by default.

    Raises:
        ConfigError: no such file or model, or class names missing.
        SchemaError: a file that holds no head.
    """
    if spec.partition(":")[0] not in KINDS:
        path = Path(spec).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"head: expected a .safetensors file or a timm:/open_clip: spec, found no file {spec!r}"
            )
        arrays, names = parse_head(path.read_bytes(), spec)
        return head_from_arrays(arrays, names)
    with refusals_about("head"):
        return _head_of_network(spec, class_names, templates)


def _head_of_network(spec: str, class_names: Sequence[str], templates: Sequence[str]) -> Head:
    parsed = parse_spec(spec)
    if parsed.kind == "timm":
        return _timm_classifier(parsed)
    if parsed.kind == "open_clip":
        if not class_names:
            raise ConfigError(f"head: the zero-shot head {spec!r} needs `class_names`, in the order of the labels")
        return _zero_shot(parsed, class_names, templates)
    raise ConfigError(f"head: expected a .safetensors file or a timm:/open_clip: spec, found {spec!r}")


def _timm_classifier(spec: EncoderSpec) -> Head:
    make_torchvision_importable()
    import timm

    name = timm_name(spec)
    with seeded():
        model: Any = downloading(spec, lambda: timm.create_model(name, pretrained=bool(spec.pretrained)))
    layer = model.get_classifier()
    if not isinstance(layer, nn.Linear):
        raise ConfigError(f"head: expected a linear classifier of '{spec}', found {type(layer).__name__}")
    if spec.checkpoint:
        prefix = next(name for name, module in model.named_modules() if module is layer)
        state = read_state_dict(Path(spec.checkpoint))
        if f"{prefix}.weight" not in state:
            raise ConfigError(f"head: {spec.checkpoint} has no {prefix}.weight")
        return Head(state[f"{prefix}.weight"].float(), state.get(f"{prefix}.bias"))
    return Head(layer.weight, layer.bias)


def _zero_shot(spec: EncoderSpec, class_names: Sequence[str], templates: Sequence[str]) -> Head:
    make_torchvision_importable()
    import open_clip

    spec = known_open_clip(spec)
    weights = spec.checkpoint or spec.pretrained
    with seeded():
        model: Any = downloading(spec, lambda: open_clip.create_model(spec.model, pretrained=weights))
    with torch.no_grad():
        weight = open_clip.build_zero_shot_classifier(
            model,
            open_clip.get_tokenizer(spec.model),
            list(class_names),
            list(templates) or open_clip.OPENAI_IMAGENET_TEMPLATES,
            # All of ImageNet's 80,000 prompts at once would not fit any memory.
            num_classes_per_batch=10,
        )
    scale = model.logit_scale.detach().exp().reshape(1)
    return Head(weight.T.contiguous(), scale=scale, names=class_names)
