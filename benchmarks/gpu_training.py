"""Parts of `benchmarks.gpu`: training steps, the optimiser, and reading batches."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from benchmarks.gpu_rows import Rates, Row, Sizes, share, sizes, teraflops, timed
from benchmarks.training import ARMS, make_artifact
from datamerge.attacks.arithmetic import arithmetic
from datamerge.encoders import load_encoder
from storage_schemas import ConfigError
from trainer import TrainConfig
from trainer.data.order import WHOLE
from trainer.run.distributed import Processes
from trainer.run.forward import Forward
from trainer.run.job import Job, make_job
from trainer.run.update import Optimisation

MEMBERS = 4


def train_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Training steps of all arms on batches in memory, and AdamW alone."""
    size = sizes(rehearse)
    arms = {"base": list(ARMS)[:: 5 if rehearse else 1], "large": ["gauss_newton", "factors"][: 1 if rehearse else 2]}
    with tempfile.TemporaryDirectory() as name:
        for (encoder, spec), batch in zip((("base", size.base), ("large", size.large)), size.batch, strict=True):
            artifact = make_artifact(Path(name, encoder), spec, "zarr", batch, MEMBERS, factors=1)
            for arm in arms[encoder]:
                job = _job(artifact, batch, size, ARMS[arm])
                for precision in size.precisions[::2]:
                    yield _train(f"{encoder}, {arm}", job, precision, size, rates)
    yield from _optimizers(size)


def compiled_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Training steps with a compiled encoder, for arms that allow it, and the time of the first step."""
    size = sizes(rehearse)
    with tempfile.TemporaryDirectory() as name, torch.compiler.set_stance("force_eager" if rehearse else "default"):
        artifact = make_artifact(Path(name, "base"), size.base, "zarr", size.batch[0], MEMBERS, factors=1)
        for arm in ("gauss_newton", "factors"):
            try:
                job = _job(artifact, size.batch[0], size, {**ARMS[arm], "compile": True, "precision": "bfloat16"})
            except ConfigError as error:
                yield Row("compiled", f"failed: base, {arm} compiled: {error}", failed=True)
                continue
            started = time.perf_counter()
            yield replace(_train(f"base, {arm} compiled", job, "bfloat16", size, rates), part="compiled")
            seconds = time.perf_counter() - started
            yield Row("compiled", f"base, {arm}: until it was measured, compilation included", 1000 * seconds)


def _job(artifact: str, batch: int, size: Sizes, settings: Mapping[str, Any]) -> Job:
    with tempfile.TemporaryDirectory() as run:
        shared = {"batch_size": batch, "steps": 100, "device": str(size.device)}
        return make_job(TrainConfig.model_validate({"artifact": artifact, "run": run, **shared, **settings}))


def _train(what: str, job: Job, precision: str, size: Sizes, rates: Rates) -> Row:
    """Training steps on the first batch of a run, in one precision."""
    (stored,) = job.feed(WHOLE, 0, 1)
    config = job.config.model_copy(update={"precision": precision})
    plain = Forward(job.encoder, job.model.head, config.precision)
    batch = config.batch_size

    def stepping(model: Forward) -> Callable[[], object]:
        training = Optimisation(replace(job, config=config, model=model), Processes())
        return lambda: training.step(0, iter([stored]), lambda: 0)

    with arithmetic(size.device, tf32=precision != "float32"):
        # Operations in compiled graphs cannot be counted; take those of the same step without compilation.
        operations = teraflops(stepping(plain))
        ms, memory = timed(stepping(job.model if config.compile else plain), size.device, size.repeats)
    part = share(ms, operations, rates, precision)
    return Row("train", f"{what}, {precision}, {batch} groups", ms, part, 1000 * batch / ms, "groups", memory)


def _optimizers(size: Sizes) -> Iterator[Row]:
    """Steps of AdamW, fresh and after a resume, when the state was loaded from a file onto the CPU."""
    parameters = [nn.Parameter(p.detach()) for p in load_encoder(size.large, str(size.device)).parameters()]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    for kind in ("foreach", "fused"):
        settings: dict[str, Any] = {"lr": 1e-9, kind: True}
        optimizer = torch.optim.AdamW(parameters, **settings)
        ms, memory = timed(optimizer.step, size.device, size.repeats)
        yield Row("train", f"AdamW of the large encoder, {kind}", ms, gigabytes=memory)
        state = tree_map_only(Tensor, Tensor.cpu, optimizer.state_dict())
        del optimizer
        resumed = torch.optim.AdamW(parameters, **settings)
        resumed.load_state_dict(state)
        ms, memory = timed(resumed.step, size.device, size.repeats)
        yield Row("train", f"AdamW of the large encoder, {kind}, after a resume", ms, gigabytes=memory)


def feed_rows(rehearse: bool, rates: Rates) -> Iterator[Row]:
    """Reading batches and copying them to the device, without training."""
    size = sizes(rehearse)
    groups = 2 * size.groups
    with tempfile.TemporaryDirectory() as name:
        for kind, workers in (("zarr", (0,)), ("webdataset", (0,) if rehearse else (0, 4, 8))):
            artifact = make_artifact(Path(name, kind), size.base, kind, groups, MEMBERS, factors=1)
            for arm, own in (("factors", workers), ("gauss_newton", workers[:1])):
                for number in own:
                    yield _feed(f"{kind}, {arm}, {number} workers", artifact, ARMS[arm], number, size)
        yield from _copies(artifact, size)


def _feed(what: str, artifact: str, settings: Mapping[str, Any], workers: int, size: Sizes) -> Row:
    job = _job(artifact, size.groups // 2, size, {**settings, "data_workers": workers})
    feed = iter(job.feed(WHOLE, 0, 8 if size.device.type == "cpu" else 48))
    # Skip the batches that were read ahead: they arrive at once.
    for _ in range(2 * workers + 2):
        next(feed)
    started = time.perf_counter()
    count = sum(len(batch.to(size.device).keys) for batch in feed)
    if size.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return Row("feed", f"{what}: a group", 1000 * seconds / count, rate=count / seconds, unit="groups")


def _copies(artifact: str, size: Sizes) -> Iterator[Row]:
    """Copying a batch to the device and converting it to floats there, from pinned and from pageable memory."""
    job = _job(artifact, size.groups, size, ARMS["gauss_newton"])
    (pinned,) = job.feed(WHOLE, 0, 1)
    pageable = tree_map_only(Tensor, Tensor.clone, pinned.content())
    for what, batch in (("pinned", pinned), ("pageable", replace(pinned, **pageable))):
        ms, _ = timed(lambda: batch.to(size.device), size.device, size.repeats)  # noqa: B023 - at once
        rate = batch.nbytes / 1e9 / (ms / 1000)
        yield Row("feed", f"copy of {size.groups} groups for gauss_newton, {what}", ms, rate=rate, unit="GB")
