"""The result of an encoder's builder, and the code that all builders share."""

from __future__ import annotations

import logging
import math
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from datamerge.encoders.specs import HUB, LOCAL, EncoderSpec
from storage_schemas import ConfigError
from storage_schemas.errors import printable
from storage_schemas.schema.preprocessing import Preprocessing

# Seed of networks without weights; their spec implies it.
RANDOM_WEIGHTS_SEED = 0
# Packages whose exceptions mean that a download failed.
CLIENTS = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib3", "urllib", "http", "socket")
# Length limit for the message of a library inside ours.
REASON_LETTERS = 240


@dataclass(frozen=True)
class Built:
    """A network before the weights of a file are loaded into it.

    Attributes:
        model: network on normalised pixels, with the weights of its tag if there is no file.
        preprocessing: preprocessing of its pixels; `model` does not contain the normalisation.
        spec: the requested spec, with everything that was resolved.
        notes: lines for the user about what was resampled.
        doubts: warnings for the user about what was assumed, if neither spec nor file tells.
        code: hash of the user's code that made the network; None if a library made it.
    """

    model: nn.Module
    preprocessing: Preprocessing
    spec: EncoderSpec
    notes: Sequence[str] = ()
    doubts: Sequence[str] = ()
    code: str | None = None


@contextmanager
def seeded() -> Iterator[None]:
    """Inside, random weights on the CPU are the fixed ones of a spec without weights."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed() would also seed the generators of GPUs, which fork_rng does not restore here.
        torch.default_generator.manual_seed(RANDOM_WEIGHTS_SEED)
        yield


def input_size(spec: EncoderSpec, recorded: Preprocessing | None) -> tuple[int, int] | None:
    """(H, W) to build a network for: from the spec, else from its file; None for the network's default."""
    if spec.image_size is not None:
        return spec.image_size, spec.image_size
    return None if recorded is None else recorded.size


def adapted(recorded: Preprocessing | None, own: Preprocessing, size: tuple[int, int] | None) -> Preprocessing:
    """The preprocessing that a file records, changed to `size`; `own`, which has that size, without a record."""
    if recorded is None or size is None or recorded.size == size:
        return recorded or own
    scale = [math.floor(side * new / old) for side, new, old in zip(recorded.scale, size, recorded.size, strict=True)]
    return Preprocessing.model_validate(
        {**recorded.model_dump(), "shape": (recorded.shape[0], *size), "scale": tuple(scale)}
    )


def resampled(spec: EncoderSpec, before: tuple[int, int], after: tuple[int, int], library: str) -> list[str]:
    """The line about position embeddings resampled to another grid; empty if weights are not loaded yet."""
    if before == after or spec.checkpoint or not spec.has_weights:
        return []
    return [
        f"encoder: {spec.named} runs on {after[0]}x{after[1]} pixels: its position embeddings, made for "
        f"{before[0]}x{before[1]}, were resampled as {library} does"
    ]


def downloading(spec: EncoderSpec, create: Callable[[], Any]) -> Any:
    """Run a constructor of a library, which may download weights.

    Raises:
        ConfigError: a download failed, and the message says how to do without it; or the library does not accept
            the weights or the configuration.
    """
    # The libraries log missing weights and every retry; the error below says it once.
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return create()
    except (ConfigError, MemoryError):
        raise
    except Exception as error:  # hub clients and formats of weights have many exceptions
        raise _refusal(spec, error) from error
    finally:
        logging.disable(logging.NOTSET)


def _refusal(spec: EncoderSpec, error: Exception) -> ConfigError:
    named = str(replace(spec, checkpoint=None))
    chain = list(_chain(error))
    fetching = next((cause for cause in chain if _from_a_client(cause)), None)
    if fetching is not None:
        return ConfigError(
            f"encoder: expected to download {_missing_part(spec)} of {named!r}, which failed "
            f"({type(fetching).__name__}); download it on a connected machine and pass {_without_network(spec)}"
        )
    if any(isinstance(cause, pickle.UnpicklingError) for cause in chain):
        return ConfigError(
            f"encoder: expected weights of {named!r} as plain tensors, found a file with other objects or of "
            "another kind; nothing in it was run"
        )
    if any(isinstance(cause, SafetensorError) for cause in chain):
        return ConfigError(
            f"encoder: expected whole weights of {named!r}, found a truncated or damaged file ({reason(error)}); "
            "copy it again"
        )
    return ConfigError(f"encoder: expected a network of {named!r}, found a problem: {reason(error)}")


def _missing_part(spec: EncoderSpec) -> str:
    return f"the weights {spec.pretrained!r}" if spec.pretrained else "the configuration and weights"


def _without_network(spec: EncoderSpec) -> str:
    if spec.kind == "hf":
        return "hf:FOLDER"
    if spec.model.startswith(HUB):
        return f"{spec.kind}:{LOCAL}FOLDER"
    return f"{spec.kind}:{spec.model}/{spec.pretrained}@FILE" if spec.pretrained else f"{spec.named}@FILE"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, the first cause last."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _from_a_client(error: BaseException) -> bool:
    if type(error).__name__ == "HFValidationError":  # not a valid name for the hub
        return False
    return isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.split(".")[0] in CLIENTS


def reason(error: BaseException) -> str:
    """The message of a library's error on one line, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = printable(" ".join(lines)) or type(error).__name__
    return text if len(text) <= REASON_LETTERS else f"{text[: REASON_LETTERS - 1]}…"


def differing(spec: EncoderSpec, taken: Mapping[str, str], tags: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The warning that a file's preprocessing was assumed from the tags of its model; empty if all tags agree.

    Args:
        spec: spec with a file and without a tag.
        taken: the assumed properties by name, in words.
        tags: the properties of each tag of the model.
    """
    groups: dict[str, list[str]] = {}
    for tag, facts in tags.items():
        phrase = ", ".join(f"{name} {text}" for name, text in facts.items() if text != taken[name])
        groups.setdefault(phrase, []).append(tag)
    agreeing = groups.pop("", [])
    if not groups:
        return []
    others = "; ".join(f"{phrase} ({_some(names)})" for phrase, names in groups.items())
    differ = [name for name in taken if any(facts[name] != taken[name] for facts in tags.values())]
    assumed = ", ".join(f"{name} {taken[name]}" for name in differ)
    return [
        f"encoder: {spec.checkpoint} does not record its preprocessing, and the weights of {spec.named} differ in "
        f"it: assumed {assumed}{f' ({_some(agreeing)})' if agreeing else ''}, others have {others}; name the weights "
        f"that it was tuned from by {spec.named}/TAG@FILE"
    ]


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *([f"{len(names) - 3} more"] if len(names) > 3 else [])])


def unknown(what: str, name: str, known: Sequence[str]) -> ConfigError:
    """The error about a name that a library does not know, with the closest known names."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; choose one of the {len(known)} known ones"
    return ConfigError(f"encoder: unknown {what} {name!r}{hint}")
