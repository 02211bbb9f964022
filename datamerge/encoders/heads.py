"""Class heads: logits from embeddings, read from a file or a network's classifier, or made from class names.

    head.safetensors    weight [classes, K], optional bias [classes], optional scale [1]
    timm:…              the classifier of that network
    open_clip:…, hf:…   zero-shot: embeddings of class names by the text tower of that network
    RUN                 the folder of a training run: the head of the network that it started from

With `@FILE` after a network, classifier or text tower come from that file if it holds them; otherwise they are those
of the network's tag, folder or repository.

A head with `scale` is that of CLIP: embeddings are normalised to length 1, and logits multiplied by `scale`. That of
SigLIP has a bias as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datamerge.encoders.building import downloading, seeded
from datamerge.encoders.checkpoints import read_state_dict
from datamerge.encoders.runs import started_from
from datamerge.encoders.specs import KINDS, EncoderSpec, parse_spec, refusals_about
from datamerge.encoders.timm_models import timm_name
from datamerge.encoders.zero_shot_heads import zero_shot
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, SchemaError
from storage_schemas.access.local_paths import user_path
from storage_schemas.schema.head import parse_head
from storage_schemas.schema.record import Array

# Kinds of encoders with text towers.
ZERO_SHOT = ("open_clip", "hf")
FORMS = "a .safetensors file, a timm:, open_clip: or hf: spec, or the folder of a training run"


class Head(nn.Module):
    """A linear or cosine classifier. Its tensors are buffers, so no optimiser changes them.

    Attributes:
        weight: [classes, K].
        bias: [classes] or None.
        scale: [1] for a cosine classifier, else None.
        names: class names; empty if unknown.

    Raises:
        ConfigError: the bias does not fit the weight.
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
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ConfigError(f"head: expected bias [{len(weight)}], one for each class, found {list(bias.shape)}")
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
        """Raise ConfigError unless the head takes embeddings of this width; `what` names it in the message."""
        if self.weight.shape[1] != embedding_dim:
            raise ConfigError(
                f"head: expected a head for embeddings of width {embedding_dim}, found weight "
                f"{list(self.weight.shape)} in {what}; use another one"
            )

    def to_bytes(self) -> bytes:
        """The head as the content of a safetensors file, as in an artifact."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.state_dict().items()}
        return save(tensors, metadata={"names": json.dumps(self.names)})


def head_from_arrays(arrays: Mapping[str, Array], names: Sequence[str]) -> Head:
    """A head from the arrays of `Artifact.head()` or `parse_head`."""
    tensors = {name: torch.from_numpy(array.copy()).float() for name, array in arrays.items()}
    return Head(tensors["weight"], tensors.get("bias"), tensors.get("scale"), names)


def load_head(
    spec: str,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    *,
    device: str = "cpu",
    shelf: Path | None = None,
) -> Head:
    """Load a head from a file, a spec or a run; see the docstring of the module.

    Args:
        spec: a path ending in .safetensors, an encoder spec, or the folder of a training run.
        class_names: class names in the order of labels; required for zero-shot heads.
        templates: prompts of zero-shot heads, with {} for the name; OpenAI's 80 for ImageNet by default.
        device: device on which zero-shot heads are computed.
        shelf: folder of a second cache of zero-shot heads, searched before the user's (see
            `datamerge.encoders.zero_shot_heads`).

    Returns:
        The head, on the CPU.

    Raises:
        ConfigError: there is no such file, model or run, the file holds no head, or class names are missing.
    """
    with refusals_about("head"):
        spec = head_spec(spec)
        if spec.partition(":")[0] in KINDS:
            return _head_of_network(spec, class_names, templates, device, shelf)
    path = user_path(spec)
    if not path.is_file():
        raise ConfigError(f"head: expected {FORMS}, found no file {spec!r}")
    try:
        arrays, names = parse_head(path.read_bytes(), spec)
    except SchemaError as error:
        raise ConfigError(f"head: {error}") from error
    return head_from_arrays(arrays, names)


def head_spec(text: str) -> str:
    """Spec of the network whose head belongs to a run or to an encoder; other texts are returned unchanged.

    Raises:
        ConfigError: the spec is invalid, or the folder holds no finished run.
    """
    if text.partition(":")[0] not in KINDS and not user_path(text).is_dir():
        return text
    return started_from(text)


def _head_of_network(
    text: str, class_names: Sequence[str], templates: Sequence[str], device: str, shelf: Path | None
) -> Head:
    spec = parse_spec(text)
    if spec.kind == "timm":
        return _timm_classifier(spec)
    if spec.kind not in ZERO_SHOT:
        raise ConfigError(f"head: expected {FORMS}, found {text!r}")
    if not class_names:
        raise ConfigError(f"head: the zero-shot head {text!r} needs `class_names`, in the order of the labels")
    return Head(**zero_shot(spec, class_names, templates, device, shelf), names=class_names)


def _timm_classifier(spec: EncoderSpec) -> Head:
    make_torchvision_importable()
    import timm

    name = timm_name(spec)
    state = dict(read_state_dict(Path(spec.checkpoint))) if spec.checkpoint else {}
    with seeded():
        # If the file has the classifier, only the names in the network are used.
        model: Any = downloading(spec, lambda: timm.create_model(name, pretrained=spec.has_weights and not state))
    layer = model.get_classifier()
    if not isinstance(layer, nn.Linear):
        raise ConfigError(f"head: expected a linear classifier of '{spec}', found {type(layer).__name__}")
    if not state:
        return Head(layer.weight, layer.bias)
    prefix = next(name for name, module in model.named_modules() if module is layer)
    if f"{prefix}.weight" in state:
        return Head(state[f"{prefix}.weight"].float(), state.get(f"{prefix}.bias"))
    if not spec.has_weights:
        raise ConfigError(
            f"head: expected {prefix}.weight in {spec.checkpoint}, found none; name the weights that it was tuned "
            f"from by {spec.named}/TAG"
        )
    return _timm_classifier(replace(spec, checkpoint=None))
