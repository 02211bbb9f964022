"""Noise of the gradient with one random view per step, compared with the noise and bias with a merged group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from datamerge.encoders import Encoder
from experiments.views.study import ARMS, Study
from trainer.arms import ARMS as TRAINED
from trainer.data.batches import pixels
from trainer.data.noise import Draws
from trainer.estimators import AROUND_MEAN, individual_loss, mean_only
from trainer.losses import CrossEntropy

MERGED = ("mean", "mean + sampled", "mean + gauss_newton")


class _Spread:
    """Sums over images of an estimator's gradients g, one for every image and draw.

    Attributes:
        total: Σ over images of the mean of g over draws.
        square: Σ over images of the mean of |g|² over draws.
        within: Σ over images of the mean of |g − its mean over draws|² over draws.
        images: number of images so far.
    """

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.square, self.within, self.images = 0.0, 0.0, 0

    def add(self, draws: list[Tensor]) -> None:
        mean = torch.stack(draws).mean(dim=0)
        square = sum(float(draw.square().sum()) for draw in draws) / len(draws)
        self.total = self.total + mean
        self.square += square
        self.within += square - float(mean.square().sum())
        self.images += 1

    @property
    def mean(self) -> Tensor:
        return torch.as_tensor(self.total) / self.images

    @property
    def variance(self) -> float:
        """E|g − E g|² over images and draws."""
        return self.square / self.images - float(self.mean.square().sum())


def compared(study: Study, encoder: Encoder, images: int, draws: int) -> dict[str, Any]:
    """The noise of the gradient with one image per step, measured on the first images.

    Returns:
        within: share of a random view's variance that comes from the view, not from the image.
        For each estimator of a merged group: `variance`, relative to a random view's; `at_equal_passes`, the same
        times its passes over those of a random view; `bias`, the distance of its mean from the gradient of all views,
        relative to the length of that gradient.
    """
    spreads = {name: _Spread() for name in ("view", *MERGED)}
    parameters = list(encoder.parameters())
    for number in range(images):
        for name, found in _gradients(study, encoder, parameters, number, draws):
            spreads[name].add(found)
    single = spreads["view"]
    facts: dict[str, Any] = {"within": round(single.within / single.images / single.variance, 4)}
    for name in MERGED:
        spread = spreads[name]
        # What the draws add to the mean is noise, no bias.
        noise = spread.within / images / max(draws - 1, 1) / images
        apart = float((spread.mean - single.mean).square().sum())
        arm = ARMS[name]
        passes = TRAINED[arm.arm].forward_passes(arm.estimator) / 3
        facts[name] = {
            "variance": round(spread.variance / single.variance, 4),
            "at_equal_passes": round(spread.variance / single.variance * passes, 4),
            "bias": round((max(apart - noise, 0.0) / float(single.mean.square().sum())) ** 0.5, 4),
        }
    return facts


def _gradients(
    study: Study, encoder: Encoder, parameters: Sequence[Tensor], number: int, draws: int
) -> Iterator[tuple[str, list[Tensor]]]:
    """Gradients of an image's views, and of every estimator of the merged group."""
    loss, groups = CrossEntropy(), study.groups
    mean, variance = groups.mean[number, None], groups.variance[number, None]
    target = groups.label[number, None]

    def flat(value: Tensor) -> Tensor:
        return torch.cat([part.flatten() for part in torch.autograd.grad(value.sum(), parameters)])

    shown = pixels(study.views[number])
    yield "view", [flat(individual_loss(encoder, one[None], [1], target, loss).loss) for one in shown]
    yield "mean", [flat(mean_only(encoder, mean, None, target, loss).loss)]
    for name in MERGED[1:]:
        estimate = AROUND_MEAN[ARMS[name].estimator or "sampled"]
        seeds = range(number * draws, (number + 1) * draws)
        yield name, [flat(estimate(encoder, mean, variance, target, loss, Draws([seed])).loss) for seed in seeds]
