"""The held-out loss."""

from __future__ import annotations

import torch

from datamerge.encoders import Encoder
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, Partition, stream_seeds
from trainer.data.stream import ended
from trainer.run.distributed import Processes
from trainer.run.forward import Forward
from trainer.run.job import HeldOut, Job
from trainer.run.objective import group_losses, held_out_settings
from trainer.run.refine import attacked


def held_out_loss(job: Job, held_out: HeldOut, encoder: Encoder, partition: Partition, own: Processes) -> float:
    """Mean training loss over all held-out groups, with the encoder in eval mode and `held_out_settings`.

    The random draws are the same every time. Only pixels get gradients, for refinement or the estimator.

    Args:
        job: the run.
        held_out: the held-out groups.
        encoder: the encoder to measure, on the job's device; its training mode is restored.
        partition: this process' part of the groups.
        own: this process among those of the run.
    """
    order, model = held_out.order, Forward(encoder, job.model.head, job.config.precision)
    config = held_out_settings(job.config)
    total = torch.zeros(1, device=job.device, dtype=torch.float32)
    with attacked(model), ended(held_out.feed(partition, 0, order.steps_per_epoch)) as batches:
        for step in range(order.steps_per_epoch):
            for share in order.shares(step, partition):
                last = share.first + len(share.indices)
                draws = Draws(stream_seeds(job.config.seed, ESTIMATOR, step, last)[share.first :])
                batch = next(batches).to(job.device).floats()
                losses = group_losses(model, batch, draws, job.loss, config, job.refinement)
                total += losses.loss.detach().sum()
    return float(own.sum(total)) / order.groups
