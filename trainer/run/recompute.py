"""Gradient checkpointing: recompute activations in the backward pass (Chen et al. 2016, arXiv:1604.06174).

Without it, autograd stores all activations that the gradients need. With it, autograd stores only the inputs of the
layers, and each layer runs again before its gradient is computed: one more forward pass per backward pass. Arithmetic
and random numbers are the same, so gradients are the same to the last bit.

The networks implement it themselves: `set_grad_checkpointing` in open_clip and timm,
`activation_checkpointing_enable` in transformers. Some of these methods do nothing, or only log that they cannot; so
the memory that autograd uses is measured here.
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
    """Bytes that autograd stores for the backward pass of one image, without parameters and buffers.

    Attributes:
        before: bytes without checkpointing.
        after: bytes with checkpointing.
    """

    before: int
    after: int


def recompute_activations(encoder: Encoder, device: torch.device) -> Kept:
    """Enable gradient checkpointing in an encoder.

    Args:
        encoder: the encoder, in training mode; networks of transformers do not checkpoint in eval mode.
        device: device of the encoder.

    Raises:
        ConfigError: the network does not support it, or saves no memory with it.
    """
    before = _kept(encoder, device)
    # open_clip only logs that a timm tower does not support it; here that is an error.
    logging.disable(logging.WARNING)
    try:
        asked = _ask(encoder.model)
        after = _kept(encoder, device)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unable(encoder, first_line(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    if after >= before:
        found = f"activations of one image take {after / 2**20:.1f} MB with it, {before / 2**20:.1f} MB without it"
        raise _unable(encoder, found if asked else "it has no method for that")
    return Kept(before, after)


def _ask(module: nn.Module) -> bool:
    """Call the checkpointing method of a network, or of its submodules; whether there was such a method."""
    for name, arguments in (
        ("set_grad_checkpointing", [True]),
        # Reentrant checkpoints have no gradients of pixels, and lose gradients behind frozen layers.
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
    """Bytes that autograd stores for one image until the gradient of its pixels is computed."""
    pixels = torch.full((1, *encoder.input_shape), 0.5, device=device, requires_grad=True)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        outputs, kept = saved_for_backward(encoder, lambda: encoder(pixels))
        torch.autograd.grad(outputs.sum(), pixels)
    return sum(kept)


def _unable(encoder: Encoder, found: str) -> ConfigError:
    return ConfigError(
        f"grad_checkpointing: expected an encoder that supports it, found {encoder.spec!r}: {found}; "
        "drop `grad_checkpointing`"
    )
