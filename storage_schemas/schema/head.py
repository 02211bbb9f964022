"""The class head of an artifact: a frozen linear classifier, in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from storage_schemas.errors import SchemaError
from storage_schemas.schema.plain_json import read_json
from storage_schemas.schema.record import Array


def parse_head(data: bytes, where: str) -> tuple[dict[str, Array], list[str]]:
    """Parse a class head in safetensors form.

    Tensors: `weight` [classes, K], optionally `bias` [classes], optionally `scale` [1] (embeddings are then
    normalised to length 1 and logits multiplied by it). Class names: JSON list in the metadata entry `names`.

    Args:
        data: contents of the file.
        where: path or URL of the file, for messages.

    Returns:
        The tensors by name, and the class names (empty if the file has none).

    Raises:
        SchemaError: not safetensors, no two-dimensional `weight`, other shapes, or numbers that are not finite.
    """
    try:
        tensors: dict[str, Array] = load_safetensors(data)
    except SafetensorError as error:
        raise SchemaError(f"{where}: expected a safetensors file with `weight`, found {error}") from None
    except KeyError as error:
        raise SchemaError(f"{where}: expected tensors of dtypes that NumPy has, such as F32, found {error}") from None
    weight = tensors.get("weight")
    if weight is None or weight.ndim != 2 or not set(tensors) <= {"weight", "bias", "scale"}:
        shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise SchemaError(f"{where}: expected weight [classes, K] and optional bias and scale, found {shapes}")
    _check_head(tensors, where)
    header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])  # valid: safetensors has parsed it
    try:
        names = read_json(header.get("__metadata__", {}).get("names", "[]"))
    except ValueError as error:
        raise SchemaError(f"{where}: expected a JSON list of class names, found {error}") from None
    if not isinstance(names, list):
        raise SchemaError(f"{where}: expected a JSON list of class names, found {type(names).__name__}")
    if names and len(names) != len(weight):
        raise SchemaError(f"{where}: expected the names of {len(weight)} classes, found {len(names)}")
    return tensors, [str(name) for name in names]


def _check_head(tensors: Mapping[str, Array], where: str) -> None:
    """Raise SchemaError for tensors of a wrong shape, numbers that are not finite, or a scale of 0 or less."""
    weight = tensors["weight"]
    for name, size in (("bias", len(weight)), ("scale", 1)):
        if name in tensors and (tensors[name].ndim > 1 or tensors[name].size != size):
            raise SchemaError(
                f"{where}: expected {name} [{size}] beside weight {list(weight.shape)}, found "
                f"{list(tensors[name].shape)}"
            )
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise SchemaError(f"{where}: expected finite numbers, found others in {name}")
    if "scale" in tensors and not tensors["scale"].item() > 0:
        raise SchemaError(f"{where}: expected a scale above 0, found {tensors['scale'].item():g}")
