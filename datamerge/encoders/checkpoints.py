"""Files of weights: reads them without executing code, loads them into a network, and writes them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn

from datamerge.encoders.activations import has_quick_gelu, is_openai, quick_gelu
from datamerge.encoders.open_clip_models import QUICK
from datamerge.encoders.specs import EncoderSpec
from datamerge.encoders.weight_files import Contents, read_contents, read_metadata
from datamerge.encoders.weight_fitting import fit
from datamerge.encoders.weight_readings import without_wrappers
from datamerge.runtime.messages import first_line
from datamerge.runtime.torchvision_ops import make_torchvision_importable
from storage_schemas import ConfigError, Location
from storage_schemas.schema.preprocessing import Preprocessing

if TYPE_CHECKING:
    from datamerge.encoders.encoder import Encoder

# Key of the preprocessing in the metadata of the safetensors files written here.
PREPROCESSING = "preprocessing"
OPENAI = "openai"  # open_clip's tag of OpenAI's weights


@dataclass(frozen=True)
class Checkpoint:
    """A file of weights.

    Attributes:
        path: path of the file.
        contents: tensors, by place in the file and by name.
        preprocessing: preprocessing that the file records, if any.
    """

    path: Path
    contents: Contents
    preprocessing: Preprocessing | None = None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file of weights (`datamerge.encoders.weight_files` says which).

    Raises:
        ConfigError: the file is not such a file.
    """
    file = Path(path)
    contents = read_contents(file)
    return Checkpoint(file, contents, _preprocessing(file, contents.metadata))


def recorded_preprocessing(path: Path) -> Preprocessing | None:
    """The preprocessing that a file of weights records, if any.

    Raises:
        ConfigError: the record is invalid, or the file is no file of weights.
    """
    return _preprocessing(path, read_metadata(path))


def _preprocessing(path: Path, metadata: Mapping[str, str]) -> Preprocessing | None:
    text = metadata.get(PREPROCESSING)
    if text is None:
        return None
    try:
        record = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"encoder: {path}: expected a preprocessing as JSON, found {first_line(error)}") from None
    return Preprocessing.read(record, f"encoder: {path}")


def as_trained(spec: EncoderSpec, checkpoint: Checkpoint | None = None) -> EncoderSpec:
    """The spec of an open_clip model with the tag, or else the activation, that its file of weights implies.

    Neither shows in the names of the weights: with the wrong activation a file loads and computes something else.

    Args:
        spec: spec with a file and no tag; any other spec is returned unchanged.
        checkpoint: the file, if it has been read.

    Raises:
        ConfigError: the file cannot be read.
    """
    if spec.kind != "open_clip" or spec.has_weights or spec.checkpoint is None:
        return spec
    checkpoint = checkpoint or read_checkpoint(spec.checkpoint)
    quick = quick_gelu(checkpoint.path, checkpoint.contents)
    if quick is None:
        return spec
    make_torchvision_importable()
    import open_clip

    if is_openai(checkpoint.contents) and open_clip.is_pretrained_cfg(spec.model, OPENAI):
        return replace(spec, pretrained=OPENAI)
    model = spec.model.removesuffix(QUICK) + (QUICK if quick else "")
    return replace(spec, model=model) if model in open_clip.list_models() else spec


def weights_sha256(module: nn.Module) -> str:
    """SHA-256 of all parameters and buffers: names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Write a network's weights and preprocessing atomically as a safetensors file, which a spec can name as FILE."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}
    target = Path(path).absolute()
    metadata = {PREPROCESSING: json.dumps(encoder.preprocessing.record())}
    Location(target.parent).write(target.name, save(tensors, metadata=metadata))


def load_into(model: nn.Module, checkpoint: Checkpoint, spec: EncoderSpec) -> list[str]:
    """Load the weights of a file into the network of a spec.

    Returns:
        Lines for the user about what was resampled or left out.

    Raises:
        ConfigError: the weights do not fit the network.
    """
    theirs, own = quick_gelu(checkpoint.path, checkpoint.contents), has_quick_gelu(model)
    if None not in (theirs, own) and theirs != own:
        names = {True: "QuickGELU", False: "GELU", None: ""}
        raise ConfigError(
            f"encoder: expected weights trained with {names[own]} for {spec}, found those of {names[theirs]} in "
            f"{checkpoint.path}; name the model {'with' if theirs else 'without'} {QUICK}, or the weights' own tag"
        )
    return fit(model, checkpoint.path, checkpoint.contents, spec)


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a file of weights by name, without common prefixes of wrappers.

    Raises:
        ConfigError: the file is no file of weights, or only the loader of a network can read it.
    """
    states = read_contents(path).states
    if not states:
        raise ConfigError(f"encoder: expected torch weights in {path}, found an archive of JAX weights")
    return without_wrappers(next(iter(states.values())))
