"""The training loss of a batch: the arm's loss, at stored or refined images, plus the clean term."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from trainer.arms import ARMS, at_images
from trainer.config import TrainConfig
from trainer.data.batches import Batch, ImageBatch
from trainer.data.noise import Draws
from trainer.estimators import GroupLoss, Model
from trainer.estimators.base import evaluate
from trainer.losses import Loss, SquaredError
from trainer.run.refine import Refinement, refine


def group_losses(
    model: Model, batch: Batch, draws: Draws, loss: Loss, config: TrainConfig, refinement: Refinement | None
) -> GroupLoss:
    """Training losses of a batch, one per group, [B].

    Args:
        model: pixels → outputs.
        batch: a batch of the arm's kind; with clean images if there is a refinement or a clean term.
        draws: random numbers, one stream per group.
        loss: the loss at one image.
        config: gives arm, estimator, samples, deviation and weight of the clean term.
        refinement: PGD steps on the images before the loss is taken; None for none.

    Raises:
        ValueError: the batch lacks images that the settings need.
        ConfigError: see `Estimator`.
    """
    losses = _arm_losses(model, batch, draws, loss, config, refinement)
    return losses._replace(loss=losses.loss + clean_term(model, batch, config)) if config.clean_weight else losses


def clean_term(model: Model, batch: Batch, config: TrainConfig) -> Tensor:
    """λ·‖f(x) − f₀(x)‖² of each group, [B], with its clean image x and the stored target embedding f₀(x).

    LORE (Khodabandeh et al. 2025, arXiv:2505.18884) bounds how far the embedding of a clean image may move, with a
    multiplier that a network learns for each image; here the multiplier λ is fixed (`clean_weight`). The term is a
    squared distance for every loss, so unlike `Cosine` it constrains the length of the embedding too.
    """
    if batch.clean is None:
        raise ValueError(f"expected clean images in the batch of {batch.keys[0]}, found none")
    return config.clean_weight * SquaredError().value(evaluate(model, batch.clean), batch.target)


def _arm_losses(
    model: Model, batch: Batch, draws: Draws, loss: Loss, config: TrainConfig, refinement: Refinement | None
) -> GroupLoss:
    arm = ARMS[config.arm]
    if refinement is None:
        return arm.loss(model, batch, loss, draws, config)
    if arm.images is None or batch.clean is None:
        raise ValueError(f"arm {config.arm}: expected images to refine, and the clean images they stay close to")
    chosen = arm.images(batch, draws, config)
    clean, target = chosen.per_image(batch.clean), chosen.per_image(batch.target)
    start = chosen.images + refinement.noise * _noise(chosen, draws) if refinement.noise else chosen.images
    refined = refine(model, start, clean, target, loss, refinement)
    return at_images(model, replace(chosen, images=refined), loss, draws, config)


def _noise(chosen: ImageBatch, draws: Draws) -> Tensor:
    """Uniform noise on [−1, 1], [M, C, H, W]; each group draws from its own stream."""
    images, most = chosen.images, max(chosen.counts)
    drawn = draws.uniform(images.new_empty(len(chosen.counts), most, *images.shape[1:])).flatten(0, 1)
    if min(chosen.counts) == most:
        return drawn
    rows = [group * most + row for group, count in enumerate(chosen.counts) for row in range(count)]
    return drawn[torch.tensor(rows).to(drawn.device, non_blocking=True)]


def held_out_settings(config: TrainConfig) -> TrainConfig:
    """Settings with which `group_losses` measures held-out groups.

    They give the training loss: the same arm, deviation and refinement, and an estimator with the same expectation.
    `antithetic` replaces `sampled`, whose first-order noise would hide the difference between two states of the
    encoder.
    """
    arm = ARMS[config.arm]
    if not arm.estimators or config.refine_steps:
        return config
    return config.model_copy(update={"estimator": arm.estimators[config.estimator].held_out})
