"""The attacks of AutoAttack (Croce & Hein 2020) that FARE evaluates with, and a check for masked gradients.

    1. APGD on the cross entropy;
    2. on what survives: APGD on the targeted difference-of-logits ratio, once per target class, most likely first

        DLR_t(z, y) = −(z_y − z_t) / (z_π1 − (z_π3 + z_π4)/2),   z_π1 ≥ z_π2 ≥ …

With fewer than four classes, where the ratio is not defined, z_t − z_y is maximised instead. An image is robust
only if no iterate of any attack is misclassified.

Shapes: B images, C H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks.apgd import APGD, apgd
from datamerge.attacks.arithmetic import arithmetic
from datamerge.attacks.ball import Precision, sample_generators
from datamerge.attacks.euclidean import Norm
from datamerge.attacks.objectives import Objective, cross_entropy

TARGETS = 9


@dataclass(frozen=True, slots=True)
class Survival:
    """Result of attacks on classifications.

    Attributes:
        clean: whether the image itself is classified correctly, bool [B].
        robust: whether it and every point that the attacks visited are classified correctly, bool [B].
        pixels: a misclassified point if there is one, else the image, float32 [B, C, H, W].
        after_cross_entropy: `robust` before the targeted attacks, bool [B].
    """

    clean: Tensor
    robust: Tensor
    pixels: Tensor
    after_cross_entropy: Tensor


def targeted_dlr(logits: Tensor, pairs: Tensor) -> Tensor:
    """Targeted DLR loss per sample: logits [B, classes], columns label and target class [B, 2] → [B]."""
    of_label, of_target = logits.gather(1, pairs).unbind(1)
    if logits.shape[1] < 4:
        return of_target - of_label
    first, _, third, fourth = logits.topk(4, dim=1).values.unbind(1)
    return (of_target - of_label) / (first - (third + fourth) / 2 + 1e-12)


def auto_attack(
    model: nn.Module,
    clean: Tensor,
    labels: Tensor,
    settings: APGD,
    generators: Sequence[np.random.Generator],
    names: Sequence[str] = (),
    *,
    targeted: bool = True,
    restarts: int = 1,
    precision: Precision = "float32",
) -> Survival:
    """Attack correctly classified images until each is misclassified or the attacks are exhausted.

    Args:
        model: logits [B, classes] from pixels in [0, 1]; in eval mode.
        clean: float32 [B, C, H, W] in [0, 1].
        labels: int64 [B].
        settings: settings of every attack; off the grid, since every iterate counts.
        generators: one random generator per sample.
        names: names of the samples, for errors.
        targeted: whether to run the targeted attacks too.
        restarts: number of starts of each attack.
        precision: precision of the search; classifications are checked in float32.

    Raises:
        NonFiniteGradient: names the samples whose loss or gradient is not finite.
    """
    if settings.grid:
        raise ValueError("settings: expected grid=False, because every iterate counts, found True")
    logits = _logits(model, clean)
    right = torch.eq(logits.argmax(dim=1), labels)
    robust, pixels = right.clone(), clean.clone()
    called = list(names) or [f"sample {row}" for row in range(len(clean))]

    def attack(objective: Objective, target: Tensor) -> None:
        """Attack all survivors; `target` has one row per image of the batch."""
        rows = torch.nonzero(robust).flatten()
        if not len(rows):
            return
        chosen = rows.tolist()
        watch = _Watch(model, labels[rows], clean[rows])
        draws, who = [generators[row] for row in chosen], [called[row] for row in chosen]
        apgd(watch, clean[rows], target[rows], objective, settings, draws, who, precision=precision)
        fooled = watch.fooled
        if precision != "float32":
            fooled = fooled & (_logits(model, watch.pixels).argmax(dim=1) != labels[rows])
        pixels[rows] = torch.where(fooled.view(-1, 1, 1, 1), watch.pixels, pixels[rows])
        robust[rows] = ~fooled

    for _ in range(restarts):
        attack(cross_entropy, labels)
    after_cross_entropy = robust.clone()
    if targeted:
        likely = logits.topk(min(TARGETS + 1, logits.shape[1]), dim=1).indices
        # The label is the most likely class of every survivor.
        for target in likely[:, 1:].unbind(1):
            for _ in range(restarts):
                attack(targeted_dlr, torch.stack([labels, target], dim=1))
    return Survival(right, robust, pixels, after_cross_entropy)


def _logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Logits in float32, [B, classes]."""
    with torch.no_grad(), arithmetic(pixels.device):
        logits: Tensor = model(pixels)
    return logits


class _Watch(nn.Module):
    """Wraps the model and records the last misclassified point of each sample."""

    def __init__(self, model: nn.Module, labels: Tensor, clean: Tensor) -> None:
        super().__init__()
        self._model, self._labels = model, labels
        self.pixels = clean.clone()
        self.fooled = torch.zeros_like(labels, dtype=torch.bool)

    def forward(self, pixels: Tensor) -> Tensor:
        logits: Tensor = self._model(pixels)
        wrong = logits.detach().argmax(dim=1) != self._labels
        self.fooled |= wrong
        self.pixels = torch.where(wrong.view(-1, 1, 1, 1), pixels.detach(), self.pixels)
        return logits


def check_masking(
    model: nn.Module,
    clean: Tensor,
    labels: Tensor,
    settings: APGD,
    robust: Tensor,
    keys: Sequence[str],
    seed: int,
    precision: Precision = "float32",
) -> list[str]:
    """Test for masked gradients, which make the robust accuracy look too high (Athalye et al. 2018).

    Args:
        model: logits from pixels.
        clean: float32 [B, C, H, W].
        labels: int64 [B].
        settings: settings of the attack that gave `robust`.
        robust: whether each image survived it, bool [B].
        keys: keys of the samples.
        seed: seed of that attack; the checks derive others from it.
        precision: precision of the search.

    Returns:
        One sentence per failed check: four times the steps from other starts break significantly more images, or
        images survive a ball so large that it holds other images.
    """
    warnings: list[str] = []
    count = len(labels)
    survivors = int(robust.sum())
    if not survivors:
        return warnings
    rows = torch.nonzero(robust).flatten()
    keep = [keys[row] for row in rows.tolist()]

    def surviving(stronger: APGD, salt: int) -> int:
        generators = [sample_generators(seed + salt, key, 1)[0] for key in keep]
        result = auto_attack(
            model, clean[rows], labels[rows], stronger, generators, targeted=False, precision=precision
        )
        return int(result.robust.sum())

    left = surviving(replace(settings, steps=4 * settings.steps), 1)
    error = float(np.sqrt(max(survivors, 1) * max(count - survivors, 1) / count))
    if survivors - left > max(2 * error, 1):
        warnings.append(
            f"{4 * settings.steps} steps from other starts leave {left} of {count} images robust, {settings.steps} "
            f"steps left {survivors}: the attack has not converged; raise `steps`"
        )
    huge = replace(settings, epsilon=_huge(settings.norm, clean))
    left = surviving(huge, 2)
    if left:
        warnings.append(
            f"{left} of {count} images are robust to epsilon {float(huge.epsilon):g} ({settings.norm}), which no "
            "classifier can be: its gradients are masked"
        )
    return warnings


def _huge(norm: Norm, clean: Tensor) -> Fraction:
    """An ε of half the pixel range per pixel: every such ball contains the uniform grey image."""
    per_pixel = Fraction(1, 2)
    return per_pixel if norm == "linf" else per_pixel * round(clean[0].numel() ** 0.5)
