"""Zero-shot heads: embeddings of class names, cached on disk.

CACHE/heads/KEY.safetensors      weight [classes, K], scale [1], and for SigLIP bias [classes]

CACHE is that of `datamerge.runtime.user_cache`. The key is a hash of everything that a head depends on: weights and
configuration of the text tower, tokens of the texts, class names and prompts. The files may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from datamerge.encoders.checkpoints import weights_sha256
from datamerge.encoders.specs import EncoderSpec
from datamerge.encoders.text_towers import TextTower, load_text_tower
from datamerge.runtime.messages import first_line
from datamerge.runtime.user_cache import user_cache
from storage_schemas import ConfigError
from storage_schemas.access.atomic import atomic_file

# All 80,000 prompts of ImageNet at once would not fit into memory.
CLASSES_AT_ONCE = 10


def zero_shot(
    spec: EncoderSpec,
    class_names: Sequence[str],
    templates: Sequence[str] = (),
    device: str = "cpu",
    shelf: Path | None = None,
) -> dict[str, Tensor]:
    """Tensors of the zero-shot head for class names, by the text tower of a spec.

    Args:
        spec: spec of kind open_clip or hf.
        class_names: class names in the order of labels.
        templates: prompts with {} for the name; OpenAI's 80 for ImageNet if empty.
        device: device on which texts are embedded.
        shelf: folder of a second cache, searched first.

    Returns:
        weight [classes, K], scale [1], and bias [classes] if the model has one.

    Raises:
        ConfigError: there is no such text tower, or it cannot be loaded.
    """
    tower = load_text_tower(spec)
    import open_clip

    prompts = list(templates) or [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    folders = [folder for folder in (shelf, user_cache("heads")) if folder is not None]
    try:
        name = f"{_key(tower, class_names, prompts)}.safetensors"
        tensors = next((found for folder in folders if (found := _read(folder / name)) is not None), None)
        if tensors is None:
            tensors = _features(tower, class_names, prompts, device)
    except (IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"encoder: expected a tokeniser that fits the text tower of '{spec}', found "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        raise ConfigError(f"encoder: expected finite embeddings of class names by '{spec}', found NaN or infinity")
    for folder in folders:
        _keep(folder / name, tensors)
    return tensors


def _features(tower: TextTower, class_names: Sequence[str], prompts: Sequence[str], device: str) -> dict[str, Tensor]:
    import open_clip

    weight = open_clip.build_zero_shot_classifier(
        tower.model.to(device), tower.tokenizer, list(class_names), list(prompts), CLASSES_AT_ONCE, device
    )
    tensors = {"weight": weight.T.contiguous().float().cpu(), "scale": tower.scale.cpu()}
    if tower.bias is not None:
        tensors["bias"] = tower.bias.cpu().repeat(len(class_names))
    return tensors


def _key(tower: TextTower, class_names: Sequence[str], prompts: Sequence[str]) -> str:
    """Hash of everything that the tensors depend on."""
    import open_clip

    words: Any = tower.tokenizer([*class_names, *prompts])
    ids = words if isinstance(words, Tensor) else words["input_ids"]
    facts = [
        weights_sha256(tower.model),
        tower.configuration,
        hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest(),
        list(class_names),
        list(prompts),
        open_clip.__version__,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(file: Path) -> dict[str, Tensor] | None:
    try:
        return load(file.read_bytes())
    except (OSError, SafetensorError):  # missing, or damaged
        return None


def _keep(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file atomically; errors are ignored, as this is only a cache."""
    try:
        if _read(file) is None:
            with atomic_file(file) as stream:
                stream.write(save(tensors))
    except OSError:
        pass
