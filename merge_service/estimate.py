"""Estimates a merge: its FLOPs by counting, and its time, bytes and cost from a small measured part.

    FLOPs of a group     forward + N · restarts · (gradients · gradient + forward)

`forward` is a pass of the encoder over one image, and `gradient` adds the backward pass to the pixels. Every group
begins with the embedding of its clean image, and every attack ends with the loss of its result. A group that is not
attacked takes the embedding alone.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from datamerge.runtime.machine import usable_cpus
from datamerge.runtime.memory import free_memory
from datamerge.runtime.threads import torch_threads
from merge_service.config import MergeConfig
from merge_service.merge import Prepared, local_device, worker_setup
from merge_service.worker import ShardWorker
from merge_service.worker_memory import worker_memory
from storage_schemas import ArtifactWriter, DatamergeError, Location

MEASURE_SECONDS = 3.0
# Start of Ray and of a worker with its imports, without loading the encoder.
START_SECONDS = 10.0
SAMPLES_AT_ONCE = 512


@dataclass(frozen=True)
class Passes:
    """FLOPs of an encoder's passes over one image.

    Attributes:
        forward: FLOPs of the embedding.
        gradient: FLOPs of the embedding and of its gradient with respect to the pixels.
    """

    forward: float
    gradient: float


def count_passes(model: nn.Module, shape: tuple[int, ...]) -> Passes:
    """Count the FLOPs of a frozen encoder's matrix products and convolutions on one image [C, H, W]."""
    device = next(model.parameters()).device
    pixels = torch.zeros((1, *shape), device=device, requires_grad=True)
    # torch does not count fused attention kernels.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            outputs = model(pixels)
        with FlopCounterMode(display=False) as backward:
            outputs.sum().backward()
    return Passes(float(forward.get_total_flops()), float(forward.get_total_flops() + backward.get_total_flops()))


def group_flops(config: MergeConfig, passes: Passes) -> float:
    """FLOPs of the encoder for one group under `adversarial` grouping."""
    if not config.attacks:
        return passes.forward
    gradients = config.steps + (1 if config.attack == "apgd" else 0)
    members = (config.group_size or 1) * config.restarts
    return passes.forward + members * (gradients * passes.gradient + passes.forward)


@dataclass(frozen=True)
class Estimate:
    """The estimate for a whole merge.

    Attributes:
        bytes: size of all shards after compression.
        seconds: wall time with `workers` workers like this machine's device, their start included.
        start_seconds: the part of `seconds` before a worker is ready.
        workers: number of workers.
        flops: FLOPs of all encoder passes; None where no encoder runs.
        flop_per_second: FLOP/s that one worker reached.
        peak_share: `flop_per_second` over that of a large matrix product on the same device and threads.
        measured: number of groups, or of given samples, that were measured.
        worker_bytes: peak memory of a worker.
        free_bytes: free memory of this machine before workers start; None if the system does not report it.
        shortage: a line for the user if that is too little for the workers that the CPUs or GPUs allow.
    """

    bytes: int
    seconds: float
    start_seconds: float
    workers: int
    flops: float | None
    flop_per_second: float | None
    peak_share: float | None
    measured: int
    worker_bytes: int
    free_bytes: int | None
    shortage: str | None

    def cost(self, price_per_hour: float) -> float:
        """Price of all workers' time, in the currency of `price_per_hour`."""
        return self.seconds / 3600 * self.workers * price_per_hour


def estimate(prepared: Prepared) -> Estimate:
    """Do a small part of the work on this machine, in a temporary folder, and extrapolate.

    Raises:
        DatamergeError: no measured group is usable.
    """
    config, plan = prepared.config, prepared.plan
    device, free = local_device(config), free_memory()
    with tempfile.TemporaryDirectory(prefix="datamerge-dry-run-") as folder, torch_threads(config.threads):
        writer = ArtifactWriter(Location(folder), plan.layout, plan.provenance)
        started = time.perf_counter()
        worker = ShardWorker(worker_setup(prepared, writer, device))
        worker.prepare()
        start = START_SECONDS + time.perf_counter() - started
        measure = _measure_groups if config.grouping == "adversarial" else _measure_samples
        measured = measure(prepared, worker, writer)
    memory = worker_memory(config, plan.layout, prepared.encoders, device)
    workers = min(config.max_workers or _fitting(config, device), plan.layout.shards)
    shortage = memory.shortage(free, workers) if free is not None else None
    if free is not None and config.max_workers is None:
        workers = memory.fitting(free, workers)
    total = measured.units_in_all * measured.seconds / measured.units
    per_unit = _flops_per_unit(prepared, worker.model)
    flops = per_unit * measured.units_in_all if per_unit else None
    rate = per_unit * measured.units / measured.attack_seconds if per_unit else None
    return Estimate(
        bytes=round(measured.bytes_per_group * plan.layout.groups),
        seconds=start + total / workers,
        start_seconds=start,
        workers=workers,
        flops=flops,
        flop_per_second=rate,
        peak_share=rate / _matrix_product_rate(config, device) if rate else None,
        measured=measured.units,
        worker_bytes=memory.bytes,
        free_bytes=free,
        shortage=shortage,
    )


@dataclass(frozen=True)
class _Measured:
    """The measured part; its unit is a group of `adversarial` grouping, else a sample."""

    units: int
    units_in_all: int
    seconds: float
    attack_seconds: float
    bytes_per_group: float


def _measure_groups(prepared: Prepared, worker: ShardWorker, writer: ArtifactWriter) -> _Measured:
    config, plan = prepared.config, prepared.plan
    first = worker.run(plan.beginning(1))  # warms up caches and allocators
    size, most = 1, plan.layout.groups_per_shard
    while True:
        task = plan.beginning(size)
        started = time.perf_counter()
        result = worker.run(task)
        seconds = time.perf_counter() - started
        if seconds > MEASURE_SECONDS or size >= most:
            break
        # Grow the part until it takes long enough to be measured.
        size = min(most, size * max(2, min(16, int(MEASURE_SECONDS / seconds) + 1)))
    _check_usable(first.groups + result.groups, prepared)
    if config.device != "cpu" and torch.cuda.is_available():
        seconds = max(result.attack_seconds, seconds - result.attack_seconds)  # on a GPU, attack and writing overlap
    return _Measured(
        units=len(task.groups),
        units_in_all=plan.layout.groups,
        seconds=seconds,
        attack_seconds=result.attack_seconds,
        bytes_per_group=_bytes(writer) / max(1, result.groups),
    )


def _measure_samples(prepared: Prepared, worker: ShardWorker, writer: ArtifactWriter) -> _Measured:
    plan = prepared.plan
    task = plan.task(0)
    items = plan.part(0, 0)[:SAMPLES_AT_ONCE]
    worker.part(items)
    started = time.perf_counter()
    partial = worker.part(items)
    seconds = time.perf_counter() - started
    result = worker.complete(task, partial)
    _check_usable(result.groups, prepared)
    return _Measured(
        units=len(items),
        units_in_all=plan.samples(range(plan.layout.shards)),
        seconds=seconds,
        attack_seconds=seconds,
        bytes_per_group=_bytes(writer) / result.groups,
    )


def _flops_per_unit(prepared: Prepared, model: nn.Module | None) -> float:
    """FLOPs of all encoder passes for one group or sample; 0 where no encoder runs."""
    config = prepared.config
    if model is None or not config.needs_encoder:
        return 0.0
    passes = count_passes(model, prepared.plan.preprocessing.shape)
    return group_flops(config, passes) if config.grouping == "adversarial" else passes.forward


def _check_usable(groups: int, prepared: Prepared) -> None:
    if not groups:
        raise DatamergeError(
            f"{prepared.source.url}: expected usable images in the first groups, found none to measure; merge a few "
            "with `limit` to see why"
        )


def _bytes(writer: ArtifactWriter) -> int:
    return int(sum(file["size"] for file in writer.location.fs.find(writer.location.root, detail=True).values()))


def _fitting(config: MergeConfig, device: str) -> int:
    if device == "cuda":
        return max(1, int(torch.cuda.device_count() / (config.num_gpus or 1.0)))
    return max(1, usable_cpus() // config.cpus)


def _matrix_product_rate(config: MergeConfig, device: str) -> float:
    """FLOP/s of a large matrix product in the attack's precision, which approximates the device's peak."""
    size, repeats = (8192, 20) if device == "cuda" else (1024, 3)
    dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    matrix = torch.randn(
        size, size, device=device, dtype=dtype
    )  # random: constant matrices draw less power, so a GPU multiplies them faster
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    try:
        times = []
        with torch_threads(config.threads):
            for _ in range(repeats):
                started = time.perf_counter()
                matrix @ matrix
                if device == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / min(times)
