"""Maps the tensors of a file to those of a network: by prefixes, or from the names of other libraries.

The converters of the libraries are used if they exist: timm's filters of each family (for the original names of DeiT,
DINOv2, ConvNeXt, …), open_clip's for MobileCLIP. `clip_names` converts the names of transformers.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamerge.encoders import clip_names
from datamerge.encoders.position_grids import resampled, timm_grids

LIBRARIES = ("open_clip", "timm", "transformers")
# Components that torch.compile, FSDP and activation checkpointing insert into names.
_WITHIN = re.compile(r"(^|\.)(?:(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+")
# Prefixes that wrappers add to the names of an image tower.
_KNOWN_PREFIXES = frozenset(
    ("module", "model", "clip", "clip_model", "net", "network", "backbone", "trunk", "encoder", "student")
    + ("visual", "vision", "vision_model", "vision_tower", "vision_encoder", "image_encoder")
)
# Buffers that do not affect what a network computes.
BENIGN = re.compile(
    r"(^|\.)(num_batches_tracked|position_ids|relative_position_index|attn_mask|total_ops|total_params)$"
)
# Errors of a library's converter for names that it does not know.
_UNKNOWN_NAMES = (KeyError, IndexError, AttributeError, TypeError, ValueError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Reading:
    """One way to map a file to a network.

    Attributes:
        how: description for messages, such as ``below `visual.` ``.
        tensors: tensors of the file, by the names in the network.
        missing, wrong: names in the network that the file lacks, or has with another shape.
        left: unused names in the file, without the prefix.
        known: whether the prefix is one that wrappers use.
        notes: descriptions of what was resampled.
    """

    how: str
    tensors: Mapping[str, Tensor]
    missing: tuple[str, ...]
    wrong: tuple[str, ...]
    left: tuple[str, ...]
    known: bool = True
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return not self.missing and not self.wrong


class Network:
    """A network, and the library's module inside it.

    Attributes:
        own: its tensors by name.
        part: the library's module with most of the tensors, or the network itself.
        path: path of that module in the network, with a trailing dot.
        strip: `path` if the module holds all tensors, else empty.
        library: one of `LIBRARIES`, or empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.own = model.state_dict()
        self.part, self.path, self.library = model, "", ""
        for name, module in model.named_modules():
            top = type(module).__module__.partition(".")[0]
            path = f"{name}." if name else ""
            if top in LIBRARIES and 2 * sum(one.startswith(path) for one in self.own) > len(self.own):
                self.part, self.path, self.library = module, path, top
                break
        self.strip = self.path if all(one.startswith(self.path) for one in self.own) else ""

    @property
    def kind(self) -> str:
        """Name of the class of the library's module."""
        return type(self.part).__name__

    @property
    def timm(self) -> tuple[str, nn.Module] | None:
        """Path below `path`, and module, of the timm network that this network is or contains."""
        if self.library == "timm":
            return "", self.part
        trunk = getattr(self.part, "trunk", None)
        return ("trunk.", trunk) if self.library == "open_clip" and isinstance(trunk, nn.Module) else None

    def reading(self, how: str, named: Mapping[str, Tensor], strip: str = "", known: bool = True) -> Reading:
        """Map the tensors `named` to the network; their names lack its prefix `strip`."""
        expected = {_clean(name).removeprefix(strip): name for name in self.own}
        found = {own: named[name] for name, own in expected.items() if name in named}
        missing = tuple(sorted(own for own in expected.values() if own not in found and not BENIGN.search(own)))
        wrong = tuple(own for own, tensor in found.items() if tensor.shape != self.own[own].shape)
        notes: tuple[str, ...] = ()
        if not missing:
            for own in wrong:
                resized = resampled(self.library, self.part, own.removeprefix(self.path), found[own])
                if resized is not None and resized[0].shape == self.own[own].shape:
                    found[own], notes = resized[0], (*notes, resized[1])
            wrong = tuple(own for own in wrong if found[own].shape != self.own[own].shape)
        return Reading(
            how, found, missing, wrong, tuple(name for name in named if name not in expected), known, notes
        )


def as_named(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Readings without converting names, below the prefixes that match most names of the network."""
    cleaned = cleaned_names(state)
    strips = {"", network.strip}
    if network.timm and network.timm[0]:
        strips.add(network.path + network.timm[0])
    for strip in sorted(strips):
        if not all(name.startswith(strip) for name in network.own):
            continue
        for prefix in _prefixes(network, cleaned, strip):
            below = {name[len(prefix) :]: tensor for name, tensor in cleaned.items() if name.startswith(prefix)}
            known = _KNOWN_PREFIXES.issuperset(filter(None, prefix.split(".")))
            yield network.reading(f"below `{prefix}`" if prefix else "names as they are", below, strip, known)


def converted(network: Network, state: Mapping[str, Tensor]) -> Iterator[list[Reading]]:
    """Readings by the converters for this kind of network, one list per converter."""
    cleaned = cleaned_names(state)
    converters: list[Callable[[Network, Mapping[str, Tensor]], Iterator[Reading]]] = []
    if network.library == "open_clip" and network.kind == "VisionTransformer":
        converters.append(_hugging_face)
    if network.library == "transformers" and network.kind.startswith("CLIPVision"):
        converters.append(_open_clip)
    if network.library == "transformers" and hasattr(network.part, "from_pretrained"):
        converters.append(_transformers)
    if network.library == "open_clip" and network.timm:
        converters.append(_mobile_clip)
    if network.timm:
        converters.append(_timm)
    for converter in converters:
        try:
            yield list(converter(network, cleaned))
        except _UNKNOWN_NAMES:
            # The names are known, but tensors are not plain ones.
            continue


def cleaned_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove the components that wrappers insert into names, if the names stay distinct."""
    cleaned = {_clean(name): tensor for name, tensor in state.items()}
    return cleaned if len(cleaned) == len(state) else state


def without_wrappers(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Remove also the prefix that wrappers add to all names."""
    cleaned = cleaned_names(state)
    prefix = next(iter(_common_prefix(cleaned)), "")
    return {name[len(prefix) :]: tensor for name, tensor in cleaned.items()}


def _clean(name: str) -> str:
    return _WITHIN.sub(r"\1", name)


def _prefixes(network: Network, state: Mapping[str, Tensor], strip: str = "") -> list[str]:
    """The three prefixes that match most names of the network; among equals, the shortest comes first."""
    expected = {_clean(name).removeprefix(strip) for name in network.own}
    count: Counter[str] = Counter()
    for name in state:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in expected:
                count["".join(f"{part}." for part in parts[:cut])] += 1
    return sorted(count, key=lambda prefix: (-count[prefix], len(prefix)))[:3] or [""]


def _hugging_face(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    for mark in [name for name in state if name.endswith(clip_names.HF_MARK)]:
        inner = mark.removesuffix(clip_names.HF_MARK)
        outer = inner.removesuffix(clip_names.VISION)
        tower = {name[len(inner) :]: tensor for name, tensor in state.items() if name.startswith(inner)}
        if inner == outer:
            # In memory, CLIPVisionModel has no prefix.
            tops = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.")
            tower = {name: tensor for name, tensor in tower.items() if name.startswith(tops)}
        projection = {name: state[outer + name] for name in [clip_names.PROJECTION] if outer + name in state}
        how = "Hugging Face's names" + (f" below `{outer}`" if outer else "")
        yield network.reading(how, clip_names.from_hf({**tower, **projection}), network.strip)


def _open_clip(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    for mark in [name for name in state if name.endswith("class_embedding")]:
        prefix = mark.removesuffix("class_embedding")
        if prefix + clip_names.OPEN_CLIP_MARK not in state:
            continue
        tower = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        named = clip_names.to_hf(tower)
        if not any(name.startswith(network.strip + clip_names.VISION) for name in network.own):
            named = {name.removeprefix(clip_names.VISION): tensor for name, tensor in named.items()}
            named.pop(clip_names.PROJECTION, None)
        yield network.reading("open_clip's names" + (f" below `{prefix}`" if prefix else ""), named, network.strip)


def _transformers(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Load with transformers, which converts the names of its earlier versions."""
    for prefix in dict.fromkeys([_prefixes(network, state, network.path)[0], *_common_prefix(state), ""]):
        below = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        try:
            loaded, without = _loaded_by_transformers(network.part, below)
        except _UNKNOWN_NAMES:
            continue
        named = {name: tensor for name, tensor in loaded.items() if name not in without}
        # Tensors of another shape keep the name in the file.
        named |= {name: below[full] for full in below for name in without if f".{full}".endswith(f".{name}")}
        named = {network.path + name: tensor for name, tensor in named.items()}
        # Tensors outside the part, such as a projection.
        named |= {name: below[name] for name in network.own if not name.startswith(network.path) and name in below}
        how = f" below `{prefix}`" if prefix else ""
        reading = network.reading(f"the names of other versions of transformers{how}", named)
        yield reading
        if reading.fits:
            return


def _loaded_by_transformers(part: Any, state: Mapping[str, Tensor]) -> tuple[Mapping[str, Tensor], set[str]]:
    """The weights of a new network of the same class loaded from the state, and the names that were not loaded."""
    from transformers.utils import logging as their_logging

    level = their_logging.get_verbosity()
    their_logging.set_verbosity(logging.CRITICAL)
    try:
        loaded, found = type(part).from_pretrained(
            None, config=part.config, state_dict=dict(state), output_loading_info=True, ignore_mismatched_sizes=True
        )
    finally:
        their_logging.set_verbosity(level)
    return loaded.state_dict(), {*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}


def _mobile_clip(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    from open_clip.convert import convert_state_dict

    for mark in [name for name in state if re.search(r"(^|\.)image_encoder\.model\.patch_emb", name)]:
        prefix = mark[: mark.index("image_encoder.model.")]
        below = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        # The converter requires it; an image tower alone has none.
        below.setdefault("logit_scale", torch.zeros(()))
        named = convert_state_dict(SimpleNamespace(visual=network.part), below)
        tower = {name[len("visual.") :]: tensor for name, tensor in named.items() if name.startswith("visual.")}
        yield network.reading("MobileCLIP's names", tower, network.strip)
        return


def _timm(network: Network, state: Mapping[str, Tensor]) -> Iterator[Reading]:
    """Convert with timm's filter, below a prefix and without one, as filters know some prefixes too."""
    path, part = cast(tuple[str, nn.Module], network.timm)
    filters = _timm_filter(part)
    if filters is None:
        return
    inside = network.path + path
    for prefix in dict.fromkeys([*_prefixes(network, state, inside), *_common_prefix(state), ""]):
        below = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
        try:
            named = filters(dict(below))
        except _UNKNOWN_NAMES:
            continue
        # open_clip's head outside the trunk.
        outside = prefix.removesuffix(path) if path else prefix
        heads = {
            f"{outside}{name}": name for own in network.own if not (name := own[len(network.path) :]).startswith(path)
        }
        named = {path + name: tensor for name, tensor in named.items()}
        named |= {name: state[full] for full, name in heads.items() if full in state}
        reading = network.reading(f"timm's names{f' below `{prefix}`' if prefix else ''}", named, network.strip)
        positions = [timm_grids(part, below[name]) for name in below if name.endswith("pos_embed")]
        notes = [
            f"{name} from {list(below[name].shape)} to {list(named[path + name].shape)}"
            for name in below
            if path + name in named and below[name].numel() != named[path + name].numel()
        ]
        grid = next(filter(None, positions), None)
        yield replace(reading, notes=(grid,) if grid and notes else tuple(notes))
        if reading.fits:
            return


def _common_prefix(state: Mapping[str, Tensor]) -> list[str]:
    """The prefix of wrappers that all names share, as a list of at most one."""
    first = next(iter(state)).split(".")
    prefix = ""
    for part in first:
        if part not in _KNOWN_PREFIXES or not all(name.startswith(f"{prefix}{part}.") for name in state):
            break
        prefix += f"{part}."
    return [prefix] if prefix else []


def _timm_filter(part: nn.Module) -> Callable[[dict[str, Tensor]], dict[str, Tensor]] | None:
    """timm's function that converts the original checkpoints of a family, with the arguments of its builder."""
    module = sys.modules[type(part).__module__]
    names = ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained")
    found: Any = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if found is None:
        return None
    parameters = inspect.signature(found).parameters
    options: dict[str, Any] = {"adapt_layer_scale": True, "interpolation": "bilinear", "antialias": False}
    config = getattr(part, "pretrained_cfg", None) or {}
    if not re.search("flexi|radio", str(config.get("architecture", ""))):
        options = {"adapt_layer_scale": True}
    given = {name: value for name, value in options.items() if name in parameters}
    arguments = (part,) if "model" in parameters else ()
    return lambda state: cast(dict[str, Tensor], found(state, *arguments, **given))
