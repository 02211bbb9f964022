"""Activations that the backward pass computes again instead of keeping them (Chen et al. 2016, arXiv:1604.06174).

Without it, autograd keeps whatever the gradients of every layer need. With it, the inputs of layers are kept, and
each layer runs once more when its gradient is due: a forward pass more for every backward pass. It does the same
arithmetic again, with the same random numbers, so gradients are the same to the last bit.

The networks do it themselves: open_clip's and timm's have `set_grad_checkpointing`, those of transformers
`activation_checkpointing_enable`. Some of these methods do nothing, or only log that they cannot; so what counts here
is how much autograd keeps.
"""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch
from torch import nn

from datamerge.encoders import Encoder
from datamerge.runtime.memory import saved_for_backward
from datamerge.runtime.messages import first_line
from storage_schemas import ConfigError


class Kept(NamedTuple):
    """Bytes that autograd keeps of one image until its gradients are taken, parameters and buffers aside.

    Attributes:
        before: by the network as it was.
        after: by the network that computes its layers again.
    """

    before: int
    after: int


def recompute_activations(encoder: Encoder, device: torch.device) -> Kept:
    """Let the layers of an encoder compute their activations again in the backward pass.

    Args:
        encoder: in the mode that it is trained in; transformers' networks keep everything in eval mode.
        device: where it is.

    Raises:
        ConfigError: a network that cannot, or that keeps as much as before.
    """
    before = _kept(encoder, device)
    # open_clip logs that a tower of timm's cannot, and goes on without; here that is an error.
    logging.disable(logging.WARNING)
    try:
        asked = _ask(encoder.model)
        after = _kept(encoder, device)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unable(encoder, first_line(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    if after >= before:
        found = f"with it autograd keeps {after / 2**20:.1f} MB of an image, without it {before / 2**20:.1f} MB"
        raise _unable(encoder, found if asked else "it has no method for that")
    return Kept(before, after)


def _ask(module: nn.Module) -> bool:
    """Switch recomputation on in a network, or in those inside it that can; whether there was one to ask."""
    for name, arguments in (
        ("set_grad_checkpointing", [True]),
        # The other form of checkpoints knows no gradient of pixels, and loses those behind frozen layers.
        ("activation_checkpointing_enable", [{"use_reentrant": False}]),
        ("gradient_checkpointing_enable", [{"use_reentrant": False}]),
    ):
        switch = getattr(module, name, None)
        if callable(switch):
            switch(*arguments)
            return True
    inside = [_ask(child) for child in module.children()]
    return any(inside)


def _kept(encoder: Encoder, device: torch.device) -> int:
    """Bytes that autograd keeps of one image until the gradient of its pixels, which is taken here."""
    pixels = torch.full((1, *encoder.input_shape), 0.5, device=device, requires_grad=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs, kept = saved_for_backward(encoder, lambda: encoder(pixels))
        torch.autograd.grad(outputs.sum(), pixels)
    return sum(kept)


def _unable(encoder: Encoder, found: str) -> ConfigError:
    return ConfigError(
        f"grad_checkpointing: expected an encoder that computes its layers again, found {encoder.spec!r}: {found}; "
        "drop `grad_checkpointing`"
    )
