"""Loads the tensors of a file into a network: all of them, or none with an error about the closest match."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.encoders.clip_names import OPEN_CLIP_MARK
from datamerge.encoders.position_grids import timm_grids
from datamerge.encoders.specs import EncoderSpec
from datamerge.encoders.weight_files import Contents
from datamerge.encoders.weight_readings import BENIGN, Network, Reading, as_named, converted
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError

# Names of CLIP's text tower, in both libraries.
_TEXT = re.compile(r"(text|text_model|text_projection|logit_scale|logit_bias)(\.|$)")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def fit(model: nn.Module, path: Path, contents: Contents, spec: EncoderSpec) -> list[str]:
    """Load the weights of a file into the network of a spec.

    Returns:
        Lines for the user about the network chosen of several, and what was resampled or left out.

    Raises:
        ConfigError: the weights do not fit; the message names the three closest readings.
    """
    if contents.jax:
        return _fit_jax(model, path, spec)
    network = Network(model)
    reading, lines = _choose(network, path, contents, spec)
    _check_plain(network, path, reading)
    lines += _left(network, path, reading, spec)
    values = {name: reading.tensors.get(name, own) for name, own in network.own.items()}
    try:
        model.load_state_dict(values)
    except RuntimeError as error:
        raise ConfigError(
            f"encoder: expected plain tensors in {path}, found some that cannot be copied: {first_line(error)}"
        ) from None
    broken = _not_finite(model)
    if broken:
        raise ConfigError(
            f"encoder: expected finite weights in {path}, found NaN or infinity in {broken[0]!r} and "
            f"{len(broken) - 1} other tensors; the training that wrote it diverged, take an earlier checkpoint"
        )
    return lines + _resampled(path, reading.notes)


def _choose(network: Network, path: Path, contents: Contents, spec: EncoderSpec) -> tuple[Reading, list[str]]:
    """The reading that fits, with the names of the file if possible, else by a converter; and lines for the user."""
    named = [(place, reading) for place, state in contents.states.items() for reading in as_named(network, state)]
    fitting = [(place, reading) for place, reading in named if reading.fits]
    if fitting:
        # Prefer readings without resampling, then known prefixes, then (the sort is stable) the likeliest place.
        fitting.sort(key=lambda one: (bool(one[1].notes), not one[1].known))
        return fitting[0][1], _alone(path, fitting)
    others: list[tuple[str, Reading]] = []
    for place, state in contents.states.items():
        for readings in converted(network, state):
            fitting = [(place, reading) for reading in readings if reading.fits]
            if fitting:
                # States with as many tensors are taken for other states of the network, without converting them.
                beside = [f"`{name}`" for name, other in contents.states.items() if len(other) >= len(state)]
                several = f"encoder: {path} holds several networks, in {' and '.join(beside)}; `{place}` was taken"
                return fitting[0][1], _alone(path, fitting) + ([several] if len(beside) > 1 else [])
            others += [(place, reading) for reading in readings]
    raise _refusal(network, path, named + others, spec)


def _alone(path: Path, fitting: list[tuple[str, Reading]]) -> list[str]:
    """Lines about several networks in one file, of which the likeliest is used; empty if they are equal."""
    place, chosen = fitting[0]
    for other_place, other in fitting[1:]:
        pairs = [(tensor, other.tensors[name]) for name, tensor in chosen.tensors.items() if name in other.tensors]
        if all(one is another or torch.equal(one, another) for one, another in pairs):
            continue
        both = f"{_where(place, chosen)} and {_where(other_place, other)}"
        if (place, chosen.known, bool(chosen.notes)) == (other_place, other.known, bool(other.notes)):
            raise ConfigError(
                f"encoder: expected one network in {path}, found two: {both}; save the one you mean alone"
            )
        return [f"encoder: {path} holds several networks, {both}; the first one was taken"]
    return []


def _where(place: str, reading: Reading) -> str:
    return f"in `{place}`, {reading.how}" if place else reading.how


def _check_plain(network: Network, path: Path, reading: Reading) -> None:
    for name, tensor in reading.tensors.items():
        odd = _oddity(tensor, network.own[name])
        if odd:
            raise ConfigError(
                f"encoder: expected plain tensors in {path}, found {name!r} {odd}, which cannot be copied into a "
                "network of floating-point weights; save it dense, unquantised and with its data"
            )


def _oddity(tensor: Tensor, own: Tensor) -> str:
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantised"
    if tensor.device.type != "cpu":
        return f"without data ({tensor.device.type})"
    return f"in {tensor.dtype}" if own.is_floating_point() and tensor.dtype not in _FLOATS else ""


def _left(network: Network, path: Path, reading: Reading, spec: EncoderSpec) -> list[str]:
    """Lines about tensors that the network does not use.

    Raises:
        ConfigError: they belong to a part that this network lacks.
    """
    left = [
        name for name in reading.left if not (BENIGN.search(name) or _TEXT.match(name) or _classifier(network, name))
    ]
    inside = [name for name in left if _inside(network, name)]
    if inside:
        raise ConfigError(
            f"encoder: expected weights of {spec.named}, found {len(inside)} tensors in {path} that it lacks, first "
            f"{inside[0]!r}; without them it would compute something else; name the network that they belong to"
            f"{_would_fit(network, [reading], spec)}"
        )
    if not left:
        return []
    return [
        f"encoder: {path}: {len(left)} tensors that do not belong to the encoder were left out, first {left[0]!r}"
    ]


def _resampled(path: Path, notes: Sequence[str]) -> list[str]:
    more = f" and {len(notes) - 2} more" if len(notes) > 2 else ""
    return (
        [f"encoder: {path}: resampled {', '.join(notes[:2])}{more}, as the network's library does"] if notes else []
    )


def _classifier(network: Network, name: str) -> bool:
    """Whether a tensor belongs to the classifier, without which timm's networks are built."""
    if not network.timm:
        return False
    path, part = network.timm
    config: Any = getattr(part, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    layers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return name.removeprefix(path).startswith(tuple(f"{layer}." for layer in (*layers, "head_dist")))


def _inside(network: Network, name: str) -> bool:
    """Whether a name is below a module of the network, or is a further one of its numbered layers."""
    first, dot, _ = name.removeprefix(network.path).partition(".")
    children = dict(network.part.named_children())
    numbered = bool(children) and all(child.isdigit() for child in children)
    return bool(dot) and (first in children or (numbered and first.isdigit()))


def _refusal(network: Network, path: Path, readings: list[tuple[str, Reading]], spec: EncoderSpec) -> ConfigError:
    # Keyed by text, so that equal problems are reported once.
    closest = {
        f"{_where(place, reading)}: {_problem(network, reading)}": reading
        for place, reading in sorted(readings, key=lambda one: len(one[1].missing) + len(one[1].wrong))
    }
    shown = "; ".join(list(closest)[:3])
    shard = re.search(r"-\d+-of-\d+\.", path.name)
    hint = "; it is one of several files, name the .index.json that lists them" if shard else ""
    hint = hint or _would_fit(network, closest.values(), spec)
    return ConfigError(f"encoder: expected weights of {spec.named}, found none in {path}; closest: {shown}{hint}")


def _problem(network: Network, reading: Reading) -> str:
    counts = f"{len(reading.missing)} of {len(network.own)} tensors missing, {len(reading.wrong)} of another shape"
    if reading.missing:
        return f"no {reading.missing[0]!r} ({counts})"
    name = sorted(reading.wrong)[0]
    shapes = f"{list(reading.tensors[name].shape)} for {list(network.own[name].shape)}"
    return f"another shape for {name!r} ({counts}: {shapes})"


def _would_fit(network: Network, readings: Iterable[Reading], spec: EncoderSpec) -> str:
    """A hint: open_clip's vision transformers with the width, depth, patches and embedding of the file."""
    if (network.library, network.kind) != ("open_clip", "VisionTransformer"):
        return ""
    import open_clip

    for reading in readings:
        tensors = {name.removeprefix(network.path): tensor for name, tensor in reading.tensors.items()}
        if not {OPEN_CLIP_MARK, "proj", "positional_embedding"} <= tensors.keys():
            continue
        convolution, positions = tensors[OPEN_CLIP_MARK].shape, tensors["positional_embedding"].shape
        if len(convolution) != 4 or len(positions) != 2:
            continue
        names = (*tensors, *reading.left)
        layers = {layer[1] for name in names if (layer := re.match(r"transformer\.resblocks\.(\d+)\.", name))}
        shape = {
            "width": convolution[0],
            "patch_size": convolution[3],
            "layers": len(layers),
            "image_size": convolution[3] * math.isqrt(positions[0] - 1),
        }
        configs = {name: open_clip.get_model_config(name) for name in open_clip.list_models()}
        fitting = [
            name
            for name, config in configs.items()
            if name != spec.model
            and config["embed_dim"] == tensors["proj"].shape[1]
            and all(config["vision_cfg"].get(key) == value for key, value in shape.items())
        ]
        if fitting:
            return f"; of the shape of {', '.join(fitting[:4])}"
    return ""


def _fit_jax(model: nn.Module, path: Path, spec: EncoderSpec) -> list[str]:
    """Load a JAX archive (ViT, BiT, SigLIP) with the loader of a timm network."""
    network = Network(model)
    part: Any = network.timm[1] if network.timm else None
    if not hasattr(part, "load_pretrained"):
        raise ConfigError(
            f"encoder: expected weights of {spec.named}, found an archive of JAX weights in {path}, which only "
            "some networks of timm can load (ViT, BiT, SigLIP)"
        )
    with torch.no_grad():
        # NaN marks tensors that the loader does not set.
        for tensor in network.own.values():
            if tensor.is_floating_point():
                tensor.fill_(math.nan)
    try:
        with np.load(path) as arrays:
            # Without SigLIP's text tower.
            images = [name for name in arrays.files if "txt/" not in name]
            layers = _jax_layers(arrays, images)
            positions = next((arrays[name] for name in images if name.endswith("pos_embedding")), None)
        if layers is not None and hasattr(part, "blocks") and layers != len(part.blocks):
            raise ValueError(f"{layers} layers for {len(part.blocks)}")
        part.load_pretrained(str(path))
    except Exception as error:  # a missing name, another shape, a damaged archive
        raise ConfigError(
            f"encoder: expected weights of {spec.named}, found an archive of JAX weights in {path} that timm "
            f"cannot load: {type(error).__name__} {first_line(error)}"
        ) from None
    broken = _not_finite(model)
    if broken:
        raise ConfigError(
            f"encoder: expected finite weights for all tensors of {spec.named} in {path}, found none for "
            f"{broken[0]!r} and {len(broken) - 1} others"
        )
    grid = None if positions is None else timm_grids(part, torch.from_numpy(positions))
    return _resampled(path, [grid] if grid else [])


def _jax_layers(arrays: Any, names: Sequence[str]) -> int | None:
    """Number of layers of the transformer in an archive, from its names; None for other networks."""
    numbers = [int(found[1]) for name in names if (found := re.search(r"Transformer/encoderblock_(\d+)/", name))]
    if numbers:
        return max(numbers) + 1
    # In scanned archives one array holds the weights of all layers.
    scanned = [name for name in names if name.endswith("Transformer/encoderblock/LayerNorm_0/scale")]
    return len(arrays[scanned[0]]) if scanned else None


def _not_finite(model: nn.Module) -> list[str]:
    return [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
