"""Whether an attack of few steps still finds something: a look for catastrophic overfitting while a run is trained.

An encoder that is trained on one-step attacks may learn to make that step lead nowhere (Wong et al. 2020): the loss
that is trained on falls, that under any better attack rises, within a few hundred updates. So on a few groups that
the run trains on, the loss under the run's own attack is compared with that under PGD, ten steps of ε/4 from uniform
noise of radius ε, by an encoder in eval mode, with the same draws every time. Held-out groups are not asked: they may
change between two sittings, and whether noise is widened must not depend on that.

It is found where all of this holds:

    PGD loss > 2 · own loss               the run's own attack misses most of what there is
    PGD loss > 1.5 · the lowest so far    it gets worse: before training the first holds too, and then it gets better
    PGD loss > 1/20 of the first          losses near 0 have ratios of any size

An attack that misses most from the beginning, while the loss under PGD only falls, is not found.

Wider noise that nothing projects, as in N-FGSM (de Jorge et al. 2022, arXiv 2202.01181), prevents it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from datamerge.runtime.messages import say, warn
from trainer.arms import ARMS
from trainer.config import FEW, TrainConfig
from trainer.data.batches import Batch
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, Partition, stream_seeds
from trainer.data.stream import ended
from trainer.run.checkpoint import step_of
from trainer.run.distributed import Processes
from trainer.run.forward import Forward
from trainer.run.job import Job
from trainer.run.objective import group_losses
from trainer.run.refine import Refinement, attacked

GROUPS = 32
PGD_STEPS = 10
MISSED, WORSE, LARGE = 2.0, 1.5, 0.05
REMEDY = 'try `on_overfit="widen"`, more `refine_steps` or a lower `learning_rate` in a new `run`'
SHARE = 0.05  # of a run's passes that a look may cost where `overfit_every` does not say how often


@dataclass
class Findings:
    """What was found so far; part of the run's state.

    Attributes:
        pgd: loss under PGD at the newest look.
        own: loss under the run's own attack there.
        first: loss under PGD at the first look.
        lowest: the lowest loss under PGD.
        healthy: updates after which the newest look found no overfitting; 0 before there was one.
        overfitted: whether the newest look found it.
        found: updates after which a look found it for the first time; None if none did.
        widened: whether the run's own attack starts from wider noise since.
    """

    pgd: float = math.nan
    own: float = math.nan
    first: float = math.nan
    lowest: float = math.inf
    healthy: int = 0
    overfitted: bool = False
    found: int | None = None
    widened: bool = False

    def add(self, step: int, pgd: float, own: float) -> None:
        """Judge the two losses of a look after `step` updates."""
        if math.isnan(self.first):
            self.first = pgd
        self.pgd, self.own, self.lowest = pgd, own, min(self.lowest, pgd)
        self.overfitted = pgd > max(MISSED * own, WORSE * self.lowest, LARGE * self.first)
        if not self.overfitted:
            self.healthy = step
        elif self.found is None:
            self.found = step

    def __str__(self) -> str:
        return (
            f"the loss under PGD rose from {self.lowest:.4g} to {self.pgd:.4g}, of which the run's own attack finds "
            f"{self.own:.4g} (catastrophic overfitting)"
        )


class Watch:
    """Looks at a run every so often.

    Args:
        job: the run, of an attack of few steps.
        own: this process among those of the run.
        partition: which part of each batch is this process'.

    Attributes:
        findings: so far.
    """

    def __init__(self, job: Job, own: Processes, partition: Partition) -> None:
        if job.refinement is None:
            raise ValueError("expected a run that attacks, found one that trains on what is stored")
        self._job, self._own, self._partition, self._refinement = job, own, partition, job.refinement
        self._every = every(job.config)
        self._groups: list[tuple[Batch, list[int]]] | None = None
        self.findings = Findings()

    @property
    def refinement(self) -> Refinement:
        """The attack to train on from now on."""
        return _widened(self._refinement) if self.findings.widened else self._refinement

    def look(self, step: int) -> dict[str, float]:
        """Look where it is due after `step` updates, and say so if there is something to see; numbers to log."""
        if step % self._every and step != self._job.steps:
            return {}
        before = self.findings.found
        self.findings.add(step, *self._losses())
        if self.findings.overfitted:
            self._act(step, before is None)
        return {"pgd_loss": self.findings.pgd, "own_attack_loss": self.findings.own}

    def _act(self, step: int, is_first: bool) -> None:
        act = self._job.config.on_overfit
        if act == "widen" and is_first and step < self._job.steps:
            self.findings.widened = True
            noise = self.refinement.noise * 255
            say(f"step {step}: {self.findings}; from here on its noise is {noise:.3g}/255 wide and nothing projects")
        elif act != "stop" and is_first:
            warn(f"step {step}: {self.findings}; {REMEDY}")

    def _losses(self) -> tuple[float, float]:
        """Mean losses of the groups under PGD and under the run's own attack."""
        job = self._job
        if self._groups is None:
            self._groups = self._own.together(lambda: list(self._read()))
        model, radius = Forward(job.encoder, job.model.head, job.config.precision), self._refinement.epsilon
        pgd = Refinement(PGD_STEPS, radius / 4, radius, radius)
        attacks_alone = job.config.model_copy(update={"clean_weight": 0.0})
        clean = attacks_alone.model_copy(update={"arm": "clean"})
        totals = torch.zeros(3, device=job.device)
        with attacked(model):
            for batch, seeds in self._groups:
                for place, config, how in ((0, clean, pgd), (1, attacks_alone, self.refinement)):
                    totals[place] += group_losses(model, batch, Draws(seeds), job.loss, config, how).loss.sum()
                totals[2] += len(seeds)
        pgd_loss, own_loss, groups = self._own.sum(totals).tolist()
        return pgd_loss / groups, own_loss / groups

    def _read(self) -> Iterator[tuple[Batch, list[int]]]:
        """This process' part of the first groups of the run, and a seed for each."""
        order, seed = self._job.order, self._job.config.seed
        steps = 0
        while steps < order.steps_per_epoch and order.groups_until(steps) < GROUPS:
            steps += 1
        with ended(self._job.feed(self._partition, 0, steps)) as batches:
            for step in range(steps):
                for share in order.shares(step, self._partition):
                    batch, last = next(batches), share.first + len(share.indices)
                    count = min(last, GROUPS - order.groups_until(step)) - share.first
                    if count > 0:
                        seeds = stream_seeds(seed, ESTIMATOR, step, last)[share.first :]
                        yield batch.to(self._job.device).floats().first(count), seeds[:count]


def is_watched(config: TrainConfig) -> bool:
    """Whether a run's attack can lose its meaning, and the settings want to know."""
    return 0 < config.refine_steps <= FEW and config.overfit_every != 0


def every(config: TrainConfig) -> int:
    """Updates between two looks."""
    if config.overfit_every is not None:
        return config.overfit_every
    look = GROUPS * (2 * PGD_STEPS + 1 + 2 * config.refine_steps + 1)
    update = config.batch_size * ARMS[config.arm].forward_passes(config.estimator, refine_steps=config.refine_steps)
    return max(100, math.ceil(look / (SHARE * update)))


def ending(findings: Findings, step: int, checkpoints: Sequence[Path]) -> str:
    """What to say of a run that ends after `step` updates, since its newest look found overfitting."""
    before = [path for path in checkpoints if step_of(path) <= findings.healthy]
    last = f"the last one from before it is {before[-1]}" if before else "none is left from before it"
    return f"step {step}: {findings}; stopped, saved {checkpoints[-1]}, {last}; {REMEDY}"


def _widened(refinement: Refinement) -> Refinement:
    return refinement._replace(noise=2 * max(refinement.noise, refinement.epsilon))
