"""Files of weights: read without executing anything in them, fitted to a network, written with its preprocessing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from datamerge.encoders.specs import EncoderSpec
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError, Location
from storage_schemas.schema.preprocessing import Preprocessing

if TYPE_CHECKING:
    from datamerge.encoders.encoder import Encoder

# Key in the metadata of the safetensors files that are written here.
PREPROCESSING = "preprocessing"


@dataclass(frozen=True)
class Checkpoint:
    """What a file of weights holds.

    Attributes:
        path: the file.
        tensors: by the names in it, without what wrappers put in front of all of them.
        preprocessing: what it records of its network's pixels, if anything.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    preprocessing: Preprocessing | None = None


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a file of weights.

    Raises:
        ConfigError: not such a file.
    """
    file = Path(path)
    return Checkpoint(file, read_state_dict(file), recorded_preprocessing(file))


def recorded_preprocessing(path: Path) -> Preprocessing | None:
    """What a file of weights records of its network's pixels, if anything.

    Raises:
        ConfigError: no such record, or no file of weights.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as opened:
            text = (opened.metadata() or {}).get(PREPROCESSING)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"encoder: {path} is no weights file: {first_line(error)}") from None
    return None if text is None else Preprocessing.read(json.loads(text), f"encoder: {path}")


def weights_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers: names, dtypes, shapes and bytes, in name order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_encoder(encoder: Encoder, path: str | os.PathLike[str]) -> None:
    """Write the network's weights and preprocessing as safetensors, atomically; the file serves as FILE of a spec."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.model.state_dict().items()}
    target = Path(path).absolute()
    metadata = {PREPROCESSING: json.dumps(encoder.preprocessing.record())}
    Location(target.parent).write(target.name, save(tensors, metadata=metadata))


def load_into(model: nn.Module, checkpoint: Checkpoint, spec: EncoderSpec) -> None:
    """Put the weights of a file into the network of a spec.

    Raises:
        ConfigError: they do not fit it.
    """
    path, state = checkpoint.path, checkpoint.tensors
    own = model.state_dict()
    # A full CLIP checkpoint holds the image tower under `visual.`; a classifier's head is not the encoder's.
    if not own.keys() <= state.keys() and any(name.startswith("visual.") for name in state):
        state = {name.removeprefix("visual."): value for name, value in state.items() if name.startswith("visual.")}
    missing = sorted(own.keys() - state.keys())
    wrong = [name for name in own.keys() & state.keys() if own[name].shape != state[name].shape]
    if missing or wrong:
        problem = f"has no {missing[0]!r}" if missing else f"has another shape for {sorted(wrong)[0]!r}"
        raise ConfigError(
            f"encoder: expected weights of {spec.named}, {path} {problem} "
            f"({len(missing)} tensors missing, {len(wrong)} of another shape)"
        )
    try:
        model.load_state_dict({name: state[name] for name in own})
    except RuntimeError:
        raise ConfigError(
            f"encoder: expected plain tensors in {path}, found some that cannot be copied (sparse, quantised or "
            "without data)"
        ) from None


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Tensors of a `.safetensors` or torch file, without executing anything in it.

    Raises:
        ConfigError: not such a file.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConfigError(f"encoder: {path} is no weights file: {first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError and friends
        raise ConfigError(
            f"encoder: expected plain tensors in {path}, found other objects: {type(error).__name__}"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        found = "other names or values in it" if isinstance(state, dict) else type(state).__name__
        raise ConfigError(f"encoder: expected a state_dict in {path}, found {found}")
    return {name.removeprefix("module."): value for name, value in state.items()}
