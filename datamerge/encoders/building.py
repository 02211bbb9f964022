"""What a builder of encoders gives, and what all builders share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import nn

from datamerge.encoders.specs import EncoderSpec
from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing

# Seed of networks without weights: part of what their spec means.
RANDOM_WEIGHTS_SEED = 0


@dataclass(frozen=True)
class Built:
    """A network, before the weights of a file are put into it.

    Attributes:
        model: on normalised pixels, with the weights of its tag if it has one and no file.
        preprocessing: of its pixels; the normalisation is not part of `model`.
        spec: what was asked for, with everything that was resolved.
    """

    model: nn.Module
    preprocessing: Preprocessing
    spec: EncoderSpec


@contextmanager
def seeded() -> Iterator[None]:
    """Random weights built in here are those that a spec without weights means."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_WEIGHTS_SEED)
        yield


def downloading(spec: EncoderSpec, create: Callable[[], Any]) -> nn.Module:
    """Run a constructor that may download weights.

    Raises:
        ConfigError: a download failed; the message says how to do without.
    """
    # The libraries log missing weights and every retry; what matters is said below, once.
    logging.disable(logging.ERROR)
    try:
        return cast(nn.Module, create())
    except Exception as error:  # every hub client has its own exceptions
        if spec.pretrained is None:
            raise
        raise ConfigError(
            f"encoder: expected to fetch the weights {spec.pretrained!r} of '{spec}', found no way to "
            f"({type(error).__name__}); download them on a connected machine and pass "
            f"{spec.kind}:{spec.model}@FILE"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def unknown(what: str, name: str, known: Sequence[str]) -> ConfigError:
    """The refusal of a name that a library does not know, with the closest ones that it does."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"; did you mean {', '.join(close)}?" if close else f"; there are {len(known)} known ones"
    return ConfigError(f"encoder: unknown {what} {name!r}{hint}")
