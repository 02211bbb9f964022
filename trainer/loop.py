"""The training loop: order → stream → loss → AdamW, with checkpoints, logs, and a stop that loses nothing.

State after step s is a pure function of the settings and s: the batch comes from `trainer.order`, the random
draws from streams keyed by the step. A run that was stopped and continued ends with the same bits as one that
was not (on the same hardware and number of threads).
"""

from __future__ import annotations

import functools
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn

from adversarial import save_encoder, weights_sha256, with_checkpoint
from console import Progress
from storage_schemas import DatamergeError
from trainer.checkpoint import WEIGHTS, RunFolder, RunSummary
from trainer.config import TrainConfig
from trainer.curvature import Curvature, GroupLoss, exact, gauss_newton, individual_loss, merged_loss
from trainer.job import Job, make_job
from trainer.logs import RunLog, say
from trainer.order import LAYERS, PSEUDO_LABELS, stream_seed
from trainer.stream import Batch, stream


class Stopped(DatamergeError):  # noqa: N818 - an outcome that was asked for, not an error
    """A signal ended the run early; its state is saved.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


def train(config: TrainConfig) -> RunSummary:
    """Run, continue or recognise as finished the training that the settings describe.

    Raises:
        ConfigError: settings, artifact and encoder do not go together, or the folder holds another run.
        DatamergeError: a loss or gradient that is not finite; names the step and the records.
        CorruptShard: stored bytes that differ from what was committed.
        Stopped: SIGINT or SIGTERM arrived; call again to continue.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(config.run)
    job = make_job(config.model_copy(update={"run": str(folder.path)}))
    folder.claim(job.identity)
    finished = folder.summary()
    if finished is not None:
        say(f"{config.run} is finished ({finished.steps} steps); nothing to do. Its encoder: {finished.encoder}")
        return finished
    return _Run(job, folder).finish()


class _Run:
    def __init__(self, job: Job, folder: RunFolder) -> None:
        self.job, self.folder = job, folder
        config = job.config
        self.parameters = [p for p in job.encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.step, self.seconds = 0, 0.0
        self._continue()
        _train_mode(job.encoder)

    def finish(self) -> RunSummary:
        """Train to the end, publish the encoder and the summary."""
        job, config = self.job, self.job.config
        started = time.monotonic() - self.seconds
        waiting = time.monotonic()
        with (
            _StopSignals() as stop,
            RunLog(self.folder.path, self.step) as log,
            Progress("train", job.steps, "steps", self.step) as progress,
        ):
            for batch in self._batches():
                waited = time.monotonic() - waiting
                values = self._update(batch)
                self.step += 1
                self.seconds = time.monotonic() - started
                log.count(len(batch.keys), waited)
                if self.step % config.log_every == 0 or self.step == job.steps:
                    log.write(self.step, job.order.epoch(self.step - 1), values)
                progress.advance(1, f"loss {values['loss']:.4g}")
                if self.step == job.steps:
                    break
                if stop.received is not None:
                    self._stop(stop.received)
                if self.step % config.checkpoint_every == 0:
                    self._save()
                waiting = time.monotonic()
        return self._publish()

    def _batches(self) -> Iterator[Batch]:
        job = self.job
        return stream(
            job.artifact,
            job.order,
            job.collate,
            start=self.step,
            stop=job.steps,
            workers=job.config.data_workers,
            pin=job.device.type == "cuda",
        )

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimiser step; returns what is logged of it."""
        config = self.job.config
        rate = learning_rate(config, self.step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        # Dropout and stochastic depth draw from torch's global generators and take no other. They get a state
        # that depends on the step alone, for the length of the step alone.
        with torch.random.fork_rng(devices=[self.job.device] if self.job.device.type == "cuda" else []):
            torch.manual_seed(stream_seed(config.seed, LAYERS, self.step))
            losses = self._losses(batch.to(self.job.device))
            loss = losses.loss.mean()
            self._check_finite(losses, batch)
            loss.backward()
        # The norm is measured even where nothing is clipped: clipping at infinity multiplies by 1.
        limit = config.gradient_clip if config.gradient_clip is not None else math.inf
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(norm):
            raise DatamergeError(self._not_finite("gradient norm", norm, batch.keys))
        self.optimizer.step()
        return {
            "loss": float(loss.detach()),
            "correction": float(losses.correction.detach().mean()),
            "gradient_norm": norm,
            "learning_rate": rate,
        }

    def _losses(self, batch: Batch) -> GroupLoss:
        job = self.job
        if batch.members is not None:
            return individual_loss(job.model, batch.members, batch.counts, batch.target, job.loss)
        if batch.mean is None:
            raise ValueError("a batch holds members or a mean")
        curvature: Curvature | None = None
        if job.config.arm == "avg":
            curvature = exact
            if job.config.curvature == "gauss_newton":
                generator = torch.Generator().manual_seed(stream_seed(job.config.seed, PSEUDO_LABELS, self.step))
                curvature = functools.partial(gauss_newton, generator=generator, samples=job.config.pseudo_labels)
        return merged_loss(job.model, batch.mean, batch.variance, batch.target, job.loss, curvature)

    def _check_finite(self, losses: GroupLoss, batch: Batch) -> None:
        values = losses.loss.detach().cpu()
        bad = [key for key, good in zip(batch.keys, values.isfinite().tolist(), strict=True) if not good]
        if bad:
            worst = float(values[~values.isfinite()][0])
            raise DatamergeError(self._not_finite("loss", worst, bad))

    def _not_finite(self, what: str, value: float, keys: list[str]) -> str:
        newest = self.folder.checkpoints()[-1:]
        state = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
        return (
            f"step {self.step + 1}: the {what} is {value} at record {', '.join(keys)}; no update "
            f"was made, {state}; "
            "try a lower --lr, a --clip or a longer --warmup in a new RUN"
        )

    def _stop(self, number: int) -> None:
        path = self._save()
        raise Stopped(
            f"stopped after step {self.step} of {self.job.steps}, saved {path}; "
            "run the same command again to continue",
            number,
        )

    def _save(self) -> Path:
        state = {
            "model": self.job.encoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "identity": self.job.identity,
        }
        return self.folder.save(state, self.job.config.keep_checkpoints)

    def _continue(self) -> None:
        checkpoints = self.folder.checkpoints()
        if not checkpoints:
            return
        state = self.folder.load(checkpoints[-1], self.job.identity, self.job.device)
        self.job.encoder.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        say(f"continuing after step {self.step} of {self.job.steps} from {checkpoints[-1]}")

    def _publish(self) -> RunSummary:
        job = self.job
        weights = self.folder.path / WEIGHTS
        save_encoder(job.encoder.eval(), weights)
        groups, manifest = job.order.groups_until(job.steps), job.artifact.manifest
        wanted = job.collate.arrays()
        bytes_read = sum(spec.nbytes for spec in manifest.layout.arrays if spec.name in wanted)
        summary = RunSummary(
            encoder=with_checkpoint(job.encoder.spec, str(weights)),
            encoder_sha256=weights_sha256(job.encoder.model),
            original=job.encoder.spec,
            original_sha256=job.encoder.sha256,
            arm=_arm_name(job),
            artifact=job.config.artifact,
            plan_sha256=manifest.plan_sha256,
            steps=job.steps,
            groups=groups,
            seconds=round(self.seconds, 3),
            bytes=groups * bytes_read,
            config=job.config.model_dump(mode="json"),
        )
        self.folder.publish(summary)
        say(f"finished {job.steps} steps in {self.seconds:.0f} s; encoder: {summary.encoder}")
        return summary


def _arm_name(job: Job) -> str:
    """The arm as the paper writes it: AT-N-Avg, AT-N-Ind; AT-N-Mean without the correction."""
    grouping = job.artifact.manifest.provenance.get("grouping")
    size = grouping.get("members") if isinstance(grouping, dict) else None
    count = job.collate.members if job.config.arm == "ind" else size
    kind = {"avg": "Avg", "ind": "Ind", "mean-only": "Mean"}[job.config.arm]
    return f"AT-{count}-{kind}" if count else f"AT-{kind}"


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Rate of a step counted from 0: linear warm-up to the peak, then a cosine that ends at 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def _train_mode(encoder: nn.Module) -> None:
    """train() for all layers but BatchNorm.

    In train mode BatchNorm would let every group's outputs, and so its input gradient, depend on the other
    groups of the batch (with one group it has no statistics at all), and its running statistics would become
    those of merged images, which are smoother than any image the encoder will see.
    """
    encoder.train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


class _StopSignals:
    """Notes the first SIGINT or SIGTERM instead of dying of it; the second has its usual effect."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        # Only the main thread may set handlers; elsewhere signals are somebody else's business.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        # Not through sys.stderr: the signal may have interrupted a write to it, which cannot be entered twice.
        os.write(2, b"stopping after this step; once more to stop at once\n")
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
