"""Detect catastrophic overfitting to attacks of few steps during training.

An encoder that is trained on one-step attacks may learn to make that step ineffective (Wong et al. 2020): within a
few hundred updates the training loss falls while the loss under stronger attacks rises. A check compares the loss
under the run's own attack with the loss under PGD (ten steps of ε/4 from uniform noise of radius ε), on a few
training groups, with the encoder in eval mode and the same random draws every time. Held-out groups are not
used: they may change when a run is continued, and whether the noise is widened must not depend on that.

A check finds overfitting if all of these hold:

    PGD loss > 2 · own loss           the run's own attack is much weaker than PGD
    PGD loss > 1.5 · lowest so far    robustness has decreased; the first condition alone can hold before training
    PGD loss > 1/20 of the first      ratios of losses near 0 mean nothing

An attack that is ineffective from the beginning, while the loss under PGD only falls, is not found.

Wider noise without projection, as in N-FGSM (de Jorge et al. 2022, arXiv:2202.01181), prevents overfitting.
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
SHARE = 0.05  # largest share of a run's passes that checks may cost by default


@dataclass
class Findings:
    """Results of the checks so far; part of the run's state.

    Attributes:
        pgd: loss under PGD at the newest check.
        own: loss under the run's own attack at the newest check.
        first: loss under PGD at the first check.
        lowest: lowest loss under PGD of all checks.
        healthy: step of the newest check without overfitting; 0 if there is none.
        overfitted: whether the newest check found overfitting.
        found: step of the first check that found overfitting; None if there is none.
        widened: whether the run's own attack now starts from wider noise.
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
        """Add the two losses of a check after `step` updates."""
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
            f"the loss under PGD rose from {self.lowest:.4g} to {self.pgd:.4g}, while under the run's own attack it "
            f"is {self.own:.4g} (catastrophic overfitting)"
        )


class Watch:
    """Checks a run for overfitting at regular intervals.

    Args:
        job: the run; it must have a refinement.
        own: this process among those of the run.
        partition: this process' part of each batch.

    Attributes:
        findings: results of the checks so far.
    """

    def __init__(self, job: Job, own: Processes, partition: Partition) -> None:
        if job.refinement is None:
            raise ValueError("refine_steps: expected a run with a refinement, found none")
        self._job, self._own, self._partition, self._refinement = job, own, partition, job.refinement
        self._every = every(job.config)
        self._groups: list[tuple[Batch, list[int]]] | None = None
        self.findings = Findings()

    @property
    def refinement(self) -> Refinement:
        """The attack to train with from now on."""
        return _widened(self._refinement) if self.findings.widened else self._refinement

    def look(self, step: int) -> dict[str, float]:
        """Check if a check is due after `step` updates, and report overfitting; returns numbers to log."""
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
            say(
                f"step {step}: {self.findings}; from now on the attack starts from noise of radius {noise:.3g}/255 "
                "and is not projected onto the ball"
            )
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
        """This process' part of the run's first `GROUPS` groups, with a seed for each."""
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
    """Whether a run's attack can overfit, and the settings ask for checks."""
    return 0 < config.refine_steps <= FEW and config.overfit_every != 0


def every(config: TrainConfig) -> int:
    """Updates between two checks."""
    if config.overfit_every is not None:
        return config.overfit_every
    look = GROUPS * (2 * PGD_STEPS + 1 + 2 * config.refine_steps + 1)
    update = config.batch_size * ARMS[config.arm].forward_passes(config.estimator, refine_steps=config.refine_steps)
    return max(100, math.ceil(look / (SHARE * update)))


def ending(findings: Findings, step: int, checkpoints: Sequence[Path]) -> str:
    """Message for a run that ends after `step` updates because of overfitting."""
    before = [path for path in checkpoints if step_of(path) <= findings.healthy]
    last = f"the last one from before it is {before[-1]}" if before else "none is left from before it"
    return f"step {step}: {findings}; stopped, saved {checkpoints[-1]}, {last}; {REMEDY}"


def _widened(refinement: Refinement) -> Refinement:
    return refinement._replace(noise=2 * max(refinement.noise, refinement.epsilon))
