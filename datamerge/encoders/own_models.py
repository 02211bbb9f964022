"""Builds networks of the specs mlp:CxHxW-…-OUT and python:MODULE:FACTORY."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise

from torch import nn

from datamerge.encoders.building import Built
from datamerge.encoders.specs import EncoderSpec
from datamerge.runtime.code_identity import code_sha256
from datamerge.runtime.factories import Failed, NoFactory, call, find_factory, module_of
from storage_schemas import ConfigError, shortened
from storage_schemas.schema.preprocessing import Preprocessing

# Largest MLP, 8 GB: a spec may come from a foreign artifact, where a few characters could exhaust the memory.
MAX_WEIGHTS = 2**31


def build_mlp(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """A ReLU network on flattened pixels."""
    text = spec.model
    match = re.fullmatch(r"(N)x(N)x(N)((?:-N){1,999})".replace("N", "[1-9][0-9]{0,9}"), text)
    if not match:
        raise ConfigError(
            f"encoder: expected mlp:CxHxW-HIDDEN-…-OUT, e.g. mlp:1x28x28-512-10, found {shortened(f'mlp:{text}')}"
        )
    shape = (int(match[1]), int(match[2]), int(match[3]))
    widths = [math.prod(shape), *(int(width) for width in match[4][1:].split("-"))]
    weights = sum((before + 1) * after for before, after in pairwise(widths))
    if weights > MAX_WEIGHTS:
        raise ConfigError(
            f"encoder: expected at most {MAX_WEIGHTS} weights, found {weights} in {shortened(f'mlp:{text}')}; "
            "choose smaller layers"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    own = Preprocessing(shape=shape, mean=(0.5,), std=(0.5,))
    return Built(nn.Sequential(*layers[:-1]), _checked(recorded or own, shape, spec), spec)


def build_python(spec: EncoderSpec, recorded: Preprocessing | None) -> Built:
    """The module that a user's function returns."""
    try:
        factory = find_factory(spec.model)
    except NoFactory as error:
        raise ConfigError(f"encoder: {error} ('{spec}')") from None
    try:
        model = call(factory)
    except Failed as error:
        raise ConfigError(f"encoder: the factory failed with {error} ('{spec}')") from error
    own = _declared(model, spec)
    checked = _checked(recorded or own, own.shape, spec)
    return Built(model, checked, spec, code=code_sha256(module_of(spec.model)))


def _declared(model: object, spec: EncoderSpec) -> Preprocessing:
    """The preprocessing that a module declares: `preprocessing`, or `input_shape` for pixels in [0, 1]."""
    shape, declared = getattr(model, "input_shape", None), getattr(model, "preprocessing", None)
    if isinstance(model, nn.Module) and isinstance(declared, Preprocessing | Mapping):
        read = declared if isinstance(declared, Preprocessing) else Preprocessing.read(declared, f"encoder: '{spec}'")
        # Without a declared normalisation the module normalises its pixels itself.
        plain = {"mean": read.mean or (0.0,), "std": read.std or (1.0,)}
        return Preprocessing.model_validate({**read.model_dump(), **plain})
    if not isinstance(model, nn.Module) or shape is None or len(shape) != 3:
        raise ConfigError(
            f"encoder: expected a torch.nn.Module on [0, 1] pixels with an attribute input_shape = (C, H, W) or "
            f"preprocessing from '{spec}', found {type(model).__name__} with input_shape {shape}"
        )
    return Preprocessing(shape=(int(shape[0]), int(shape[1]), int(shape[2])), mean=(0.0,), std=(1.0,))


def _checked(preprocessing: Preprocessing, shape: tuple[int, int, int], spec: EncoderSpec) -> Preprocessing:
    """The preprocessing, if its pixels have the shape of the network, which cannot be changed here.

    Raises:
        ConfigError: its shape is another.
    """
    size = (spec.image_size,) * 2 if spec.image_size else preprocessing.size
    if (preprocessing.shape[0], *size) != shape:
        raise ConfigError(
            f"encoder: expected pixels {shape} of {spec.named}, found {(preprocessing.shape[0], *size)} in "
            f"{'image_size' if spec.image_size else spec.checkpoint}; the {spec.kind}: spec itself sets the size"
        )
    return preprocessing
