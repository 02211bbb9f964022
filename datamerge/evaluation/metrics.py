"""Embedding loss and accuracy of one encoder on one batch, clean and under attack.

Shapes: B images, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from datamerge.attacks import PGD, attack, cross_entropy, sample_generators, squared_error
from datamerge.encoders import Encoder, Head
from datamerge.sources import Sample
from storage_schemas import DatamergeError


@dataclass
class Tally:
    """Results per image, in the source's order.

    Attributes:
        clean_loss, adversarial_loss: embedding losses.
        clean_correct, robust_correct: whether labelled images were classified correctly.
        seconds: wall time.
    """

    clean_loss: list[float] = field(default_factory=list)
    adversarial_loss: list[float] = field(default_factory=list)
    clean_correct: list[bool] = field(default_factory=list)
    robust_correct: list[bool] = field(default_factory=list)
    seconds: float = 0.0


def embedding_losses(
    encoder: Encoder, target: Tensor, pixels: Tensor, samples: Sequence[Sample], settings: PGD, seed: int
) -> tuple[Tensor, Tensor]:
    """‖f(x) − f_original(x)‖² and ‖f(x') − f_original(x)‖² with x' from PGD on it: FARE's Table 14 quantities.

    x itself lies in the ball, so the adversarial loss of an image is never below its clean one.

    Args:
        encoder: f.
        target: f_original(x), [B, K].
        pixels: x, float32 [B, C, H, W] in [0, 1].
        samples: whose pixels they are; their keys seed the attack.
        settings: the attack's.
        seed: the evaluation's.

    Returns:
        Clean and adversarial losses, [B] each.

    Raises:
        DatamergeError: a loss is not finite; names the samples.
    """
    names = [sample.name for sample in samples]
    with torch.no_grad():
        clean = squared_error(encoder(pixels), target)
    check_finite(clean, names, "the clean embedding loss")
    generators = [sample_generators(seed, sample.key, 1)[0] for sample in samples]
    attacked = attack(encoder, pixels, target, squared_error, settings, generators, names)
    check_finite(attacked.loss, names, "the embedding loss under attack")
    return clean, torch.maximum(clean, attacked.loss)


def correct(
    encoder: Encoder,
    head: Head,
    labels: Tensor,
    pixels: Tensor,
    samples: Sequence[Sample],
    settings: PGD,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Which images are classified correctly clean, and which both clean and after PGD on cross entropy.

    Only images that are correct clean are attacked; the others are not robust whatever the attack finds.

    Args:
        encoder: f.
        head: logits from embeddings.
        labels: rows of the head, int64 [B].
        pixels: float32 [B, C, H, W] in [0, 1].
        samples: whose pixels they are; their keys seed the attack.
        settings: the attack's.
        seed: the evaluation's.

    Returns:
        Two bool tensors [B].

    Raises:
        DatamergeError: a logit or a gradient is not finite; names the samples.
    """
    model = nn.Sequential(encoder, head)
    clean = _predicts(model, pixels, labels, [sample.name for sample in samples])
    robust = clean.clone()
    chosen = torch.nonzero(clean).flatten()
    if len(chosen):
        attackable = [samples[index] for index in chosen.tolist()]
        names = [sample.name for sample in attackable]
        generators = [sample_generators(seed, sample.key, 1)[0] for sample in attackable]
        attacked = attack(model, pixels[chosen], labels[chosen], cross_entropy, settings, generators, names)
        robust[chosen] = _predicts(model, attacked.pixels, labels[chosen], names)
    return clean, robust


def _predicts(model: nn.Module, pixels: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    with torch.no_grad():
        logits = model(pixels)
    check_finite(logits.sum(dim=1), names, "the sum of logits")
    return torch.eq(logits.argmax(dim=1), labels)


def check_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    """Raise DatamergeError that names the samples with a value that is not finite."""
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        bad = [names[index] for index in torch.nonzero(~finite).flatten().tolist()]
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise DatamergeError(f"{what} is not finite for {', '.join(bad[:5])}{more}; check the encoder's weights")
