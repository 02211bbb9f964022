"""Class heads: logits from embeddings, read from a file, from a network's classifier or made from class names.

    head.safetensors    weight [classes, K], optional bias [classes], optional scale [1]
    timm:…              the classifier of that network
    open_clip:…, hf:…   zero-shot: embeddings of class names by the text tower of that network
    RUN                 the folder of a training run: the head of the network that it started from

Behind a network, `@FILE` takes classifier or text tower from that file where it holds them; else they are those of
the network's tag, folder or repository.

A head with `scale` is CLIP's: embeddings are normalised to length 1 and the logits multiplied by scale. SigLIP's has
a bias as well.
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

# Kinds of encoders that have text towers.
ZERO_SHOT = ("open_clip", "hf")
FORMS = "a .safetensors file, a timm:, open_clip: or hf: spec, or the folder of a training run"


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


def load_head(
    spec: str,
    class_names: Sequence[str] = (),
    templates: Sequence[str] = (),
    *,
    device: str = "cpu",
    shelf: Path | None = None,
) -> Head:
    """Load a head from a file, a spec or a run (forms in the module's docstring).

    Args:
        spec: a path ending in .safetensors, an encoder spec, or the folder of a training run.
        class_names: needed by zero-shot heads: the classes in label order.
        templates: prompts of zero-shot heads with {} for the name; OpenAI's 80 for ImageNet by default.
        device: where zero-shot heads are computed.
        shelf: a folder that zero-shot heads are sought in first, before the one of all commands (see
            `datamerge.encoders.zero_shot_heads`), and kept in as well.

    Returns:
        The head, on the CPU.

    Raises:
        ConfigError: no such file, model or run, a file that holds no head, or class names missing.
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
    """The network whose head belongs to an encoder, for the folder of a run and for the encoder of one; else `text`.

    Raises:
        ConfigError: an encoder spec that cannot be, or a folder without a finished run.
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
        # Only its names are of use where a file has the classifier.
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
