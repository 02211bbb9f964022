"""One optimiser step: micro-batches → losses → gradients, summed over processes → AdamW.

The loss of a step is the mean over the groups of its whole batch, whatever the number of processes and
micro-batches; so learning rate and effective batch size mean the same in every layout, and the results differ
by rounding alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from datamerge.attacks.arithmetic import fixed_order
from datamerge.runtime.memory import out_of_memory_advice
from datamerge.runtime.messages import first_line, warn
from storage_schemas import DatamergeError
from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.data.noise import Draws
from trainer.data.order import ESTIMATOR, LAYERS, Partition, Share, stream_seeds
from trainer.estimators import GroupLoss
from trainer.run.distributed import Processes
from trainer.run.exchange import Exchange
from trainer.run.forward import seeded_layers
from trainer.run.job import Job
from trainer.run.objective import group_losses


class NotFinite(DatamergeError):
    """A loss or gradient is not finite; no update was made.

    Attributes:
        what: "loss" or "gradient norm".
        value: the value that is not finite.
        keys: keys of the affected records, over all processes.
        batches: this process' micro-batches of the step.
    """

    def __init__(self, what: str, value: float, keys: list[str], batches: list[Batch]) -> None:
        super().__init__(f"the {what} is {value} at record {', '.join(keys)}")
        self.what, self.value, self.keys, self.batches = what, value, keys, batches


class Outcome(NamedTuple):
    """Result of a step; `values` and `stop` are equal in all processes.

    Attributes:
        values: numbers to log.
        waited: seconds that this process waited for data.
        stop: number of a signal that some process received; 0 for none.
    """

    values: dict[str, float]
    waited: float
    stop: int


@dataclass
class Optimisation:
    """Optimiser of a run, with the moving average of the weights.

    Attributes:
        job: the run.
        own: this process among those of the run.
        parameters: parameters that are not frozen.
        optimizer: AdamW.
        average: exponential moving average of the encoder; None without the setting `ema`.
        exchange: sums gradients over processes.
    """

    job: Job
    own: Processes

    def __post_init__(self) -> None:
        config = self.job.config
        self.parameters = [p for p in self.job.encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            # Fused AdamW moves a third of the bytes on a GPU. On CPUs the default keeps earlier releases' results.
            fused=True if self.job.device.type == "cuda" else None,
        )
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(self.job.encoder, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
        self.partition = Partition(self.own.rank, self.own.world, config.accumulate)
        self.exchange = Exchange(self.own, self.parameters)
        self._ordered = True

    def restore(self, state: dict[str, Any]) -> None:
        """Load the optimiser state of a checkpoint; this device, not the checkpoint, decides if AdamW is fused."""
        groups = [{**group, "fused": self.optimizer.defaults["fused"]} for group in state["param_groups"]]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    def order(self) -> AbstractContextManager[None]:
        """Select deterministic kernels on a GPU, unless this run has needed an operation that has none."""
        return fixed_order(self.job.device) if self._ordered else nullcontext()

    def step(
        self,
        step: int,
        batches: Iterator[Batch],
        stopping: Callable[[], int],
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Outcome:
        """Do step `step`, counted from 0.

        Args:
            step: number of the step.
            batches: the feed, whose next items are this step's micro-batches.
            stopping: returns the number of a signal received here, or 0; called once, at the exchange.
            waiting: context in which a signal may interrupt the wait for the first micro-batch of a single process.

        Raises:
            NotFinite: a loss or gradient is not finite in some process; raised in all of them.
            DatamergeError: out of memory, or another process died.
        """
        job = self.job
        rate = learning_rate(job.config, step, job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        size = job.order.batch_size_of(step)
        seen: list[Batch] = []
        results: list[GroupLoss] = []
        waited = 0.0
        shares = job.order.shares(step, self.partition)
        for share in shares:
            started = time.monotonic()
            with waiting() if not seen and self.own.world == 1 else nullcontext():
                batch = next(batches)
            waited += time.monotonic() - started
            with out_of_memory_advice(lambda: _out_of_memory(job.config, len(batch.keys))):  # noqa: B023 - at once
                try:
                    with self.order(), self.exchange.sending(share is shares[-1]):
                        losses = self._backward(step, share, batch, size)
                except RuntimeError as error:
                    self._give_up_order(error)
                    results = [self._backward(step, *again, size) for again in zip(shares, seen, strict=False)]
                    losses = self._backward(step, share, batch, size)
            seen.append(batch)
            results.append(losses)
        stop = stopping()
        totals = self.exchange.finish(self._numbers(results, stop))
        values, stop = self._update(totals, stop, size, seen, results)
        return Outcome({**values, "learning_rate": rate}, waited, stop)

    def _update(
        self, totals: Tensor, stop: int, size: int, seen: list[Batch], results: list[GroupLoss]
    ) -> tuple[dict[str, float], int]:
        """Make the step of the optimiser with the exchanged gradients; returns numbers to log, and any signal."""
        # Without clipping the norm is still measured: clipping at infinity multiplies by 1.
        limit = self.job.config.gradient_clip if self.job.config.gradient_clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(self.parameters, limit)
        # The only wait for the device in a step.
        norm_value, loss, correction, corrected, bad, stops, *used = torch.cat(
            [norm.detach().reshape(1).to(totals), totals]
        ).tolist()
        if bad or not math.isfinite(norm_value):
            self._not_finite(bool(bad), norm_value, seen, results)
        for parameter, count in zip(self.parameters, used, strict=self.own.world > 1):
            if not count:  # no process has a gradient: AdamW then skips the parameter, as in a single process
                parameter.grad = None
        # `stops` is a sum over processes; gather the numbers themselves.
        stop = max(self.own.gather(stop)) if stops else 0
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.job.encoder)
        values = {"loss": loss / size}
        if corrected:
            values["correction"] = correction / size
        return {**values, "gradient_norm": norm_value}, stop

    def _give_up_order(self, error: RuntimeError) -> None:
        """Fall back to non-deterministic kernels if an operation has no deterministic one; re-raise other errors."""
        if not self._ordered or "deterministic" not in str(error):
            raise error
        warn(
            f"{self.job.encoder.spec} needs an operation without a deterministic kernel ({first_line(error)[:80]}…): "
            "two runs of the same settings differ in the last digits"
        )
        self._ordered = False
        self.optimizer.zero_grad(set_to_none=True)  # the failed pass and the earlier ones of this step are repeated

    def _backward(self, step: int, share: Share, batch: Batch, size: int) -> GroupLoss:
        """Add the gradients of one micro-batch; returns its detached losses."""
        job, last = self.job, share.first + len(batch.keys)
        # Dropout and stochastic depth use torch's global generators. Seed these by step and position, for this
        # micro-batch only.
        with seeded_layers(stream_seeds(job.config.seed, LAYERS, step, share.first + 1)[-1], job.device):
            seeds = stream_seeds(job.config.seed, ESTIMATOR, step, last)[share.first :]
            batch = batch.to(job.device).floats()
            losses = group_losses(job.model, batch, Draws(seeds), job.loss, job.config, job.refinement)
        (losses.loss.sum() / size).backward()
        correction = losses.correction
        return GroupLoss(losses.loss.detach(), None if correction is None else correction.detach())

    def _numbers(self, results: list[GroupLoss], stop: int) -> Tensor:
        """Numbers of this process, on the device: [Σ loss, Σ correction, corrected groups, non-finite, stop]."""
        numbers = torch.zeros(5, device=self.job.device)
        for losses in results:
            numbers[0] += losses.loss.sum()
            if losses.correction is not None:
                numbers[1] += losses.correction.sum()
                numbers[2] += len(losses.loss)
            numbers[3] += (~losses.loss.isfinite()).sum()
        numbers[4] = stop
        return numbers

    def _not_finite(self, bad_loss: bool, norm: float, seen: list[Batch], results: list[GroupLoss]) -> None:
        found: list[tuple[str, float]] = []
        for batch, losses in zip(seen, results, strict=True):
            found += [
                (key, value)
                for key, value in zip(batch.keys, losses.loss.tolist(), strict=True)
                if not (bad_loss and math.isfinite(value))
            ]
        everywhere = [pair for pairs in self.own.gather(found) for pair in pairs]
        what, value = ("loss", everywhere[0][1]) if bad_loss else ("gradient norm", norm)
        raise NotFinite(what, value, [key for key, _ in everywhere], seen)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of a step, counted from 0: linear warm-up to the peak, then cosine decay to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _out_of_memory(config: TrainConfig, groups: int) -> str:
    """Message with the settings to change, the most helpful first."""
    advice = [f"`accumulate={2 * config.accumulate}` (same result)"] if groups > 1 else []
    arm = ARMS[config.arm]
    if not (config.grad_checkpointing or (arm.estimators and arm.estimators[config.estimator].twice)):
        advice.append("`grad_checkpointing=True` (same result)")
    advice += arm.memory_advice(config.estimator)
    if config.precision != "bfloat16":
        advice.append('`precision="bfloat16"`')
    return (
        f"out of memory with {groups} groups at a time (batch_size {config.batch_size}, accumulate "
        f"{config.accumulate}, arm {config.arm}); try " + ", or ".join(advice or ["a smaller `encoder`"])
    )
