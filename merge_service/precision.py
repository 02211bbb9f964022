"""Compares a low-precision attack with the float32 one, on a batch of the real data."""

from __future__ import annotations

import torch

from datamerge.attacks import OBJECTIVES, gradient_sign
from merge_service.adversarial_groups import Attacker, Batch


def compare(attacker: Attacker, batch: Batch) -> str:
    """One line: the share of gradient signs that agree at the same points, and the loss of both attacks.

    Raises:
        NonFiniteGradient: a gradient is not finite in either precision.
    """
    chosen = attacker.precision
    inputs = attacker.inputs(batch)
    result, embeddings = attacker.attack(batch, inputs)
    attacker.precision = "float32"
    try:
        exact, _ = attacker.attack(batch, inputs)
    finally:
        attacker.precision = chosen
    images = len(result.pixels)
    target = attacker.targets(batch, embeddings).repeat_interleave(images // len(batch), dim=0)
    objective = OBJECTIVES[attacker.objective]
    signs = [gradient_sign(attacker.model, exact.pixels, target, objective, p) for p in (chosen, "float32")]
    agreement = float((signs[0] == signs[1]).to(torch.float32).mean())
    reached, expected = float(result.loss.mean()), float(exact.loss.mean())
    return (
        f"precision {chosen}: {100 * agreement:.1f} % of gradient signs as in float32; attack loss {reached:.6g}, "
        f"in float32 {expected:.6g} ({100 * reached / expected:.1f} %), on {images} images"
    )
