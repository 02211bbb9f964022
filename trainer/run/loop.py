"""The training loop: order → stream → step, with checkpoints, logs and stops that lose no work.

The state after step s is a pure function of the settings and s: the batch comes from `trainer.data.order`, random
draws from streams keyed by the step. An interrupted and continued run ends with the same bits as an uninterrupted one
on the same hardware with the same number of threads and processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

import torch

from datamerge.attacks import arithmetic
from datamerge.encoders import Encoder, save_encoder, weights_sha256, with_checkpoint
from datamerge.runtime import Progress
from datamerge.runtime.messages import say, warn
from datamerge.runtime.signals import StopSignals, WaitedInVain
from datamerge.runtime.threads import torch_threads
from storage_schemas import DatamergeError, UserError
from storage_schemas.access.atomic import atomic_file
from storage_schemas.schema.run import WEIGHTS, RunSummary
from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.data.stream import ended, worker_deaths
from trainer.errors import NotFiniteRun, OverfittedRun, Stopped
from trainer.run.checkpoint import RunFolder, step_of
from trainer.run.distributed import Processes, processes
from trainer.run.job import Job, make_job
from trainer.run.logs import RunLog
from trainer.run.overfit import Findings, Watch, ending, is_watched
from trainer.run.update import NotFinite, Optimisation, Outcome
from trainer.run.validation import held_out_loss
from trainer.run.wandb_log import check_installed


def train(config: TrainConfig) -> RunSummary:
    """Train an encoder with the given settings, here or on Ray workers; continue an interrupted run.

    A finished run is left as it is. Under torchrun every process calls this function.

    Returns:
        Summary of the finished run, as in RUN/run.json.

    Raises:
        ConfigError: settings, artifact and encoder are incompatible, or the folder holds another run.
        NotFiniteRun: a loss or gradient is not finite; the message names the step and the records.
        OverfittedRun: catastrophic overfitting, with `on_overfit="stop"`.
        DatamergeError: out of memory, or another process of the run died.
        CorruptShard: stored bytes differ from their checksum.
        Stopped: SIGINT or SIGTERM arrived; call again to continue.
    """
    if config.ray_workers is None and config.ray_address is None:
        return train_here(config)
    from trainer.run.ray_launch import train_on_ray  # takes a second, and needs the extra `ray`

    return train_on_ray(config)


def train_here(config: TrainConfig) -> RunSummary:
    """`train` without Ray: in this process and the others that torchrun or Ray Train started."""
    with torch_threads(config.threads), processes(config.device) as own:
        folder = own.together(lambda: RunFolder(config.run))
        settings = config.model_copy(update={"run": str(folder.path)})
        return run_job(own.together(lambda: make_job(settings, own)), folder, own)


def run_job(job: Job, folder: RunFolder, own: Processes) -> RunSummary:
    """Run or continue a prepared job, unless it is finished; returns and raises as `train`."""
    own.first_alone(lambda: check_installed(job.config.wandb_project))
    own.first_alone(lambda: folder.claim(job.identity))
    own.together(lambda: folder.claim(job.identity))
    finished = own.together(folder.summary)
    if finished is not None:
        say(f"{folder.path} is finished ({finished.steps} steps); nothing to do. Its encoder: {finished.encoder}")
        return finished
    # Speeds up what autocast leaves in float32: the first layer, and attention that is differentiated twice.
    with arithmetic(job.device, tf32=job.config.precision != "float32"):
        return _Run(job, folder, own).finish()


class _Run:
    def __init__(self, job: Job, folder: RunFolder, own: Processes) -> None:
        self.job, self.folder, self.own = job, folder, own
        self.training = Optimisation(job, own)
        self.step, self.seconds, self.best = 0, 0.0, math.inf
        self.best_of = None if job.held_out is None else job.held_out.measure
        self.watch = Watch(job, own, self.training.partition) if is_watched(job.config) else None
        self._continue()

    @property
    def published(self) -> Encoder:
        """The encoder to evaluate and publish: the moving average if there is one."""
        average = self.training.average
        return self.job.encoder if average is None else average.module  # type: ignore[return-value]  # a Module to torch

    def finish(self) -> RunSummary:
        """Train to the end, publish the encoder and the summary."""
        job, config = self.job, self.job.config
        self._end_if_overfitted()
        started = time.monotonic() - self.seconds
        with ExitStack() as stack:
            stop = stack.enter_context(StopSignals())
            stack.enter_context(worker_deaths())
            # The context closes the stream, so that data workers end with this block even after an error.
            batches = stack.enter_context(ended(job.feed(self.training.partition, self.step, job.steps)))
            log = self.own.first_alone(
                lambda: stack.enter_context(RunLog(self.folder.path, self.step, config.model_dump(mode="json")))
            )
            progress = (
                stack.enter_context(Progress("train", job.steps, "steps", self.step)) if self.own.first else None
            )
            if not self.step:
                self._look(log)
            while self.step < job.steps:
                outcome = self._update(batches, stop)
                self.seconds = time.monotonic() - started
                values = {**outcome.values, **self._look(log), **self._evaluate(log)}
                if log is not None:
                    log.count(job.order.batch_size_of(self.step - 1), outcome.waited)
                    if (
                        self.step % config.log_every == 0
                        or self.step == job.steps
                        or len(values) > len(outcome.values)
                    ):
                        log.write(self.step, job.order.epoch(self.step - 1), values)
                if progress is not None:
                    progress.advance(1, f"loss {values['loss']:.4g}")
                self._end_if_overfitted()
                if self.step < job.steps:
                    self._save_or_stop(outcome.stop)
        return self._publish()

    def _update(self, batches: Iterator[Batch], stop: StopSignals) -> Outcome:
        try:
            outcome = self.training.step(self.step, batches, lambda: stop.received, stop.waiting)
        except WaitedInVain:
            self._save_or_stop(stop.received)
            raise
        except NotFinite as error:
            raise NotFiniteRun(self._not_finite(error)) from None
        except UserError as error:
            if self.own.world == 1:
                raise
            # Only this process has read the bad record; the others wait for its gradients. A UserError would mean
            # that all processes have agreed to end (`Processes.together`), so another class is raised.
            raise DatamergeError(str(error)) from None
        self.step += 1
        return outcome

    def _not_finite(self, error: NotFinite) -> str:
        newest = self.folder.checkpoints()[-1:]
        state = f"the newest checkpoint is {newest[0]}" if newest else "there is no checkpoint yet"
        dump = self.folder.path / f"not-finite-step-{self.step + 1:06d}-process-{self.own.rank}.pt"
        try:
            with atomic_file(dump) as stream:
                torch.save(
                    {"step": self.step + 1, "batches": [batch.floats().content() for batch in error.batches]}, stream
                )
            where = f"the batch is in {dump}"
        except OSError as failure:  # the non-finite value is the more important error
            where = f"the batch could not be saved ({failure.strerror})"
        return (
            f"step {self.step + 1}: {error}; no update was made, {state}, {where}; "
            "try a lower `learning_rate`, a `gradient_clip` or more `warmup_steps` in a new `run`"
        )

    def _look(self, log: RunLog | None) -> dict[str, float]:
        """Check for overfitting if a check is due, and apply any change of the attack; returns numbers to log."""
        if self.watch is None:
            return {}
        started = time.monotonic()
        with self.training.order():
            values = self.watch.look(self.step)
        if log is not None:
            log.pause(time.monotonic() - started)
        self._attack_as_watched(self.watch)
        return values

    def _attack_as_watched(self, watch: Watch) -> None:
        """Take over the watch's attack for training and held-out groups, whose losses then start a new series."""
        if watch.refinement == self.job.refinement:
            return
        held_out = self.job.held_out
        if held_out is not None:
            held_out = replace(held_out, measure=f"{held_out.measure}, wider noise")
            self.best, self.best_of = math.inf, held_out.measure
        self.job = self.training.job = replace(self.job, refinement=watch.refinement, held_out=held_out)

    def _end_if_overfitted(self) -> None:
        """With `on_overfit="stop"`, save the state of an overfitted run and end it.

        Raises:
            OverfittedRun: the newest check found overfitting.
        """
        watch, config = self.watch, self.job.config
        if watch is None or config.on_overfit != "stop" or not watch.findings.overfitted:
            return
        self.own.first_alone(lambda: self.folder.save(self._state(), config.keep_checkpoints))
        raise OverfittedRun(ending(watch.findings, self.step, self.folder.checkpoints()))

    def _evaluate(self, log: RunLog | None) -> dict[str, float]:
        """Measure the held-out loss if an evaluation is due, and save the best state; returns numbers to log."""
        job = self.job
        if job.held_out is None or (self.step % job.config.eval_every and self.step != job.steps):
            return {}
        started = time.monotonic()
        with self.training.order():
            loss = held_out_loss(job, job.held_out, self.published, self.training.partition, self.own)
        # After overfitting the attack is ineffective, so its low loss does not make the state the best.
        if loss < self.best and not (self.watch and self.watch.findings.overfitted):
            self.best = loss
            self.own.first_alone(lambda: self.folder.save_best(self._state()))
        if log is not None:
            log.pause(time.monotonic() - started)
        return {"eval_loss": loss}

    def _save_or_stop(self, number: int) -> None:
        if not number and self.step % self.job.config.checkpoint_every:
            return
        path = self.own.first_alone(lambda: self.folder.save(self._state(), self.job.config.keep_checkpoints))
        if number:
            raise Stopped(
                f"stopped after step {self.step} of {self.job.steps}, saved {path}; "
                "run the same command again to continue",
                number,
            )

    def _state(self) -> dict[str, Any]:
        average = self.training.average
        return {
            "model": self.job.encoder.state_dict(),
            "average": None if average is None else average.state_dict(),
            "optimizer": self.training.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "best_of": self.best_of,
            "findings": None if self.watch is None else asdict(self.watch.findings),
            "torch": str(torch.__version__),
            "identity": self.job.identity,
        }

    def _continue(self) -> None:
        newest = self.own.gather(max(self.folder.checkpoints(), key=step_of, default=None))
        if len(set(newest)) > 1:
            raise DatamergeError(
                f"{self.folder.path}: expected all processes to see the same checkpoints, found {newest}; put "
                "`run` on a file system that all machines share"
            )
        path = newest[0]
        if path is None:
            return
        state = self.own.together(lambda: self.folder.load(path, self.job.identity))
        self.job.encoder.load_state_dict(state["model"])
        self.training.restore(state["optimizer"])
        if self.training.average is not None:
            self.training.average.load_state_dict(state["average"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.watch is not None and state.get("findings") is not None:
            self.watch.findings = Findings(**state["findings"])
            self._attack_as_watched(self.watch)
        if self.best_of in (None, state.get("best_of")):
            # Kept without held-out groups too, for a later session that has the same ones again.
            self.best, self.best_of = state["best"], state.get("best_of")
        elif state["best"] < math.inf:
            say(
                "the held-out loss is not comparable with earlier values (`eval_artifact` or the datamerge version "
                "changed): the search for the best state starts again"
            )
        if state["torch"] != str(torch.__version__):
            warn(
                f"{path} was written with torch {state['torch']}, this is torch {torch.__version__}: the run "
                "continues, but its results may differ in the last digits"
            )
        say(f"continuing after step {self.step} of {self.job.steps} from {path}")

    def _publish(self) -> RunSummary:
        job = self.job
        weights = self.folder.path / WEIGHTS
        self.own.first_alone(lambda: save_encoder(self.published.eval(), weights))
        groups = job.order.groups_until(job.steps)
        summary = RunSummary(
            encoder=with_checkpoint(job.encoder.spec, str(weights)),
            encoder_sha256=weights_sha256(self.published.model),
            original=job.encoder.spec,
            original_sha256=job.encoder.sha256,
            arm=job.origin.arm,
            artifact=job.origin.url,
            plan_sha256=job.origin.sha256,
            artifacts=job.origin.artifacts,
            steps=job.steps,
            groups=groups,
            seconds=round(self.seconds, 3),
            bytes=round(groups * job.origin.bytes_per_group),
            config=job.config.model_dump(mode="json"),
            overfitted=None if self.watch is None else self.watch.findings.found,
            widened=self.watch is not None and self.watch.findings.widened,
            preprocessing=job.encoder.preprocessing,
        )
        self.own.first_alone(lambda: self.folder.publish(summary))
        say(f"finished {job.steps} steps in {self.seconds:.0f} s; encoder: {summary.encoder}")
        return summary
