"""Reads files of weights by their content, not their name, and without running code from them.

    safetensors          under any name
    torch.save           a state_dict, or a training checkpoint that contains one or several
    TorchScript          OpenAI's archives
    NumPy's .npz         JAX weights, of which timm reads the tensors
    *.index.json         an index of shards of the first two formats beside it

Tensors are read from disk on use, if the format allows it.
"""

from __future__ import annotations

import argparse
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError

# Keys of the network in training checkpoints, in order of preference. Like timm, averaged weights come first.
WRAPPERS = (
    "state_dict_ema",
    "model_ema",
    "state_dict",
    "model",
    "model_state_dict",
    "module",
    "net",
    "network",
    "encoder",
    "teacher",
    "ema",
)
# Longest header that safetensors accepts, in bytes.
_LONGEST_HEADER = 100_000_000
# Deepest nesting of a state_dict in a checkpoint.
_DEPTH = 4


@dataclass(frozen=True)
class Contents:
    """The content of a file of weights.

    Attributes:
        states: tensors by name, by their place in the file: `""`, `state_dict`, `model.visual`, …; the likeliest
            place comes first.
        metadata: metadata of safetensors files.
        jax: whether it is an archive of JAX weights, whose tensors are not read here.
    """

    states: Mapping[str, Mapping[str, Tensor]]
    metadata: Mapping[str, str] = field(default_factory=dict)
    jax: bool = False


def read_contents(path: Path) -> Contents:
    """Read a file of weights.

    Raises:
        ConfigError: it is no such file; the message says what it is instead.
    """
    kind = _kind(path)
    with _damage_refused(path, kind):
        if kind == "index":
            return _sharded(path)
        if kind == "safetensors":
            with safe_open(path, "pt") as opened:
                metadata = opened.metadata() or {}
            return Contents(_states(path, load_file(path)), metadata)
        if kind == "npz":
            return Contents({}, jax=True)
        if kind == "TorchScript":
            return Contents({"": _torchscript(path)})
        return Contents(_states(path, _torch_file(path, mmap=kind == "torch")))


def read_metadata(path: Path) -> Mapping[str, str]:
    """The metadata of a safetensors file or of the shards of an index; empty for other files.

    Raises:
        ConfigError: it is no file of weights.
    """
    kind = _kind(path)
    with _damage_refused(path, kind):
        if kind == "index":
            return _index(path)[1]
        if kind != "safetensors":
            return {}
        with safe_open(path, "pt") as opened:
            return opened.metadata() or {}


def _kind(path: Path) -> str:
    """The format: safetensors, torch, pickle (of torch before 1.6), TorchScript, npz or index."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise ConfigError(f"encoder: expected a file of weights at {path}, found none ({error.strerror})") from None
    if not head:
        raise ConfigError(f"encoder: expected weights in {path}, found an empty file; copy it again")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text.startswith(b"version https://git-lfs"):
        raise ConfigError(
            f"encoder: expected weights in {path}, found a Git LFS pointer in their place; run `git lfs pull` there"
        )
    if text.startswith(b"<"):
        raise ConfigError(
            f"encoder: expected weights in {path}, found a web page; download the file itself, not the page about it"
        )
    if text.startswith(b"{"):
        return "index"
    if head.startswith(b"\x80"):
        return "pickle"
    raise ConfigError(
        f"encoder: expected weights in {path}, found neither safetensors nor a torch file, TorchScript, npz or an "
        "index of shards"
    )


def _kind_of_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        raise ConfigError(
            f"encoder: {path} is truncated or damaged (its directory is missing); copy it again"
        ) from None
    ends = {name.rpartition("/")[2] for name in names}
    if "data.pkl" in ends:
        return "TorchScript" if "constants.pkl" in ends else "torch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise ConfigError(
        f"encoder: expected weights in {path}, found a zip archive of other files ({', '.join(names[:3])}); "
        "unpack it and name the file of weights in it"
    )


@contextmanager
def _damage_refused(path: Path, kind: str) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            # Ignore torch's deprecation warnings about TorchScript, quantised tensors and old pickles.
            warnings.simplefilter("ignore")
            yield
    except ConfigError:
        raise
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, MemoryError) as error:
        raise ConfigError(f"encoder: {path} is truncated or damaged ({kind}): {first_line(error)}") from None
    except Exception as error:  # pickle.UnpicklingError, and any error of a malformed pickle
        raise _foreign_objects(path, kind, error) from None


def _foreign_objects(path: Path, kind: str, error: Exception) -> ConfigError:
    """The error about a pickle that needs more than tensors; none of its code was run."""
    try:
        asked = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path)) if kind == "torch" else []
    except Exception:  # a malformed pickle
        asked = []
    asked = [name for name in asked if not name.startswith("numpy.")] or re.findall(r"GLOBAL (\S+)", str(error))
    more = f" and {len(asked) - 3} more" if len(asked) > 3 else ""
    # torch's message is not shown, as it starts with the advice to run the code.
    asked = asked or ["a pickle that torch did not write"]
    return ConfigError(
        f"encoder: expected plain tensors in {path}, found objects that only run code could make "
        f"({', '.join(asked[:3])}{more}); where you trust it, load it yourself and save its state_dict()"
    )


def _torch_file(path: Path, mmap: bool) -> Any:
    """Load a file of torch.save that holds only tensors, containers, NumPy numbers and arrays, and Namespaces."""
    # NumPy's functions for unpickling, as schedulers and generators store NumPy values; names vary by version.
    makers: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]]
    safe: list[Any] = [
        (one, f"numpy.{core}.multiarray.{one.__name__}") for one in makers for core in ("core", "_core")
    ]
    safe += [np.ndarray, np.dtype, argparse.Namespace, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"}]
    with torch.serialization.safe_globals(safe):
        if path.suffix == ".safetensors":
            # torch.load would trust this suffix, so pass it a stream.
            with path.open("rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _torchscript(path: Path) -> Mapping[str, Tensor]:
    """Parameters and buffers of a TorchScript archive; archives that run code on loading are refused."""
    with zipfile.ZipFile(path) as archive:
        # Iterate over entries, as two may share a name.
        sources = [entry for entry in archive.infolist() if entry.filename.endswith(".py")]
        if any(b"__setstate__" in archive.read(entry) for entry in sources):
            raise ConfigError(
                f"encoder: expected plain tensors in {path}, found a TorchScript archive that runs code when it is "
                "loaded (__setstate__); where you trust it, load it yourself and save its state_dict()"
            )
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


def _states(path: Path, loaded: Any) -> Mapping[str, Mapping[str, Tensor]]:
    found = dict(_nested(loaded, "", 0))
    if not found:
        what = "other names or values in it" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise ConfigError(f"encoder: expected a state_dict in {path}, found {what}")
    return {place: found[place] for place in sorted(found, key=_likelihood)}


def _nested(value: Any, place: str, depth: int) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    if not isinstance(value, Mapping) or depth > _DEPTH:
        return
    tensors = {name: one.detach() for name, one in value.items() if isinstance(name, str) and isinstance(one, Tensor)}
    if tensors:
        yield place, tensors
    for name, one in value.items():
        # Skip optimisers, whose moments have the names and shapes of weights.
        if isinstance(name, str) and not re.match(r"optim|sched|scaler|loops|callbacks", name):
            yield from _nested(one, f"{place}.{name}" if place else name, depth + 1)


def _likelihood(place: str) -> tuple[int, int]:
    first = place.partition(".")[0]
    known = WRAPPERS.index(first) if first in WRAPPERS else len(WRAPPERS)
    return (-1 if not place else known), place.count(".")


def _index(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The shard of each tensor, and the metadata, from an index."""
    try:
        index = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"encoder: {path} is truncated or damaged (JSON): {first_line(error)}") from None
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ConfigError(
            f"encoder: expected weights in {path}, found JSON without a `weight_map`; name a file of weights"
        )
    for shard in listed.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ConfigError(
                f"encoder: expected the names of files beside {path} in its `weight_map`, found {shard!r}"
            )
    metadata = index.get("metadata")
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return listed, {name: text for name, text in texts if isinstance(text, str)}


def _sharded(path: Path) -> Contents:
    listed, metadata = _index(path)
    names: dict[str, list[str]] = {}
    for name, shard in listed.items():
        names.setdefault(shard, []).append(name)
    missing = [shard for shard in names if not (path.parent / shard).is_file()]
    if missing:
        raise ConfigError(
            f"encoder: expected the {len(names)} files that {path} lists beside it, {len(missing)} are missing, "
            f"first {missing[0]!r}; copy all of them"
        )
    tensors: dict[str, Tensor] = {}
    for shard, expected in names.items():
        held = next(iter(read_contents(path.parent / shard).states.values()), {})
        absent = [name for name in expected if name not in held]
        if absent:
            raise ConfigError(
                f"encoder: expected {absent[0]!r} in {path.parent / shard}, as {path.name} says, found none"
            )
        tensors.update((name, held[name]) for name in expected)
    return Contents({"": tensors}, metadata)
