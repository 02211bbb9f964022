"""Objectives that attacks maximise: a loss per sample between the encoder's output and a fixed target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Objective = Callable[[Tensor, Tensor], Tensor]
ObjectiveName = Literal["squared_error", "cross_entropy"]


def squared_error(outputs: Tensor, target: Tensor) -> Tensor:
    """‖f(x') − f_θ0(x)‖² per sample, summed over dimensions (PAPER eq. 11): [B, K], [B, K] → [B]."""
    return (outputs - target).square().sum(dim=1)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy per sample: logits [B, classes], class indices [B] → [B]."""
    return torch.nn.functional.cross_entropy(outputs, labels, reduction="none")


OBJECTIVES: dict[ObjectiveName, Objective] = {"squared_error": squared_error, "cross_entropy": cross_entropy}
