"""The loss on groups that are not trained on."""

from __future__ import annotations

import torch

from datamerge.encoders import Encoder
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, Layout, stream_seeds
from trainer.data.stream import Batch
from trainer.estimators import along_factors, antithetic, individual_loss, mean_only
from trainer.run.distributed import Processes
from trainer.run.forward import Forward
from trainer.run.job import HeldOut, Job


def held_out_loss(job: Job, held_out: HeldOut, encoder: Encoder, layout: Layout, own: Processes) -> float:
    """Mean loss over all groups, with the encoder in eval mode and without gradients.

    Merged groups are measured by `antithetic`, which needs no derivative, with the same draws every time; single
    members and bare means by their loss.

    Args:
        job: the run.
        held_out: the groups.
        encoder: the one to measure, on the job's device; its training mode is restored.
        layout: which part of the groups is this process'.
        own: this process among those of the run.
    """
    order, model = held_out.order, Forward(encoder, job.model.head, job.config.precision)
    modes = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    total = torch.zeros(1, device=job.device, dtype=torch.float32)
    batches = held_out.feed(layout, 0, order.steps_per_epoch)
    with torch.no_grad():
        for step in range(order.steps_per_epoch):
            for share in order.shares(step, layout):
                last = share.first + len(share.indices)
                seeds = stream_seeds(job.config.seed, ESTIMATOR, step, last)[share.first :]
                total += _losses(job, model, next(batches).to(job.device), Draws(seeds)).sum()
    for module, training in modes:
        module.training = training
    return float(own.sum([torch.zeros_like(total)], total)) / order.groups


def _losses(job: Job, model: Forward, batch: Batch, draws: Draws) -> torch.Tensor:
    if batch.members is not None:
        return individual_loss(model, batch.members, batch.counts, batch.target, job.loss).loss
    if batch.mean is None:
        raise ValueError("a batch holds members or a mean")
    if batch.factors is not None:
        return along_factors(model, batch.mean, batch.factors, batch.target, job.loss, draws).loss
    if batch.variance is None:
        return mean_only(model, batch.mean, None, batch.target, job.loss).loss
    return antithetic(model, batch.mean, batch.variance, batch.target, job.loss, draws).loss
