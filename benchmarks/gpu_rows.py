"""Shared by all parts of `benchmarks.gpu`: rows, sizes, and the counting of time, operations and kernels."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from datamerge.attacks import Precision

RATES = "rates"
PRECISIONS: tuple[Precision, ...] = ("bfloat16", "tf32", "float32")
Rates = Mapping[str, float]
"""TFLOP/s of a large matrix product on this GPU, by precision."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part, what: names of the part and of the measurement.
        ms: milliseconds.
        share: FLOP/s of all matrix products and convolutions, over the rate of a large matrix product in the same
            precision.
        rate, unit: number of units per second.
        gigabytes: largest allocation on the GPU.
        failed: whether the measurement failed; `what` then says why.
    """

    part: str
    what: str
    ms: float | None = None
    share: float | None = None
    rate: float | None = None
    unit: str = ""
    gigabytes: float | None = None
    failed: bool = False

    def cells(self) -> list[str]:
        """Cells of the row in the table."""
        rate = "" if self.rate is None else f"{self.rate:.4g} {self.unit}"
        numbers = ("" if self.ms is None else f"{self.ms:.4g}", "" if self.share is None else f"{self.share:.0%}")
        return [self.part, self.what, *numbers, rate, "" if self.gigabytes is None else f"{self.gigabytes:.2f}"]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Parse a row from JSON; ValueError for any other line."""
        values = json.loads(line)
        if not isinstance(values, dict) or "part" not in values:
            raise ValueError(f"no row: {line!r}")
        return cls(**values)


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        base, large, convolutional: specs of encoders.
        side: side of the matrices.
        images: numbers of images attacked at a time.
        batch: groups per training step, with the base and the large encoder.
        groups: groups to read, and to merge per shard.
        precisions: precisions in which attacks and training are timed.
    """

    device: torch.device
    base: str
    large: str
    convolutional: str
    side: int
    images: tuple[int, ...]
    batch: tuple[int, int]
    groups: int
    repeats: int
    precisions: tuple[Precision, ...]


def sizes(rehearse: bool) -> Sizes:
    """The sizes for a GPU, or for a rehearsal."""
    if rehearse:
        tiny = "mlp:3x32x32-16-8"
        return Sizes(torch.device("cpu"), tiny, tiny, "timm:test_resnet", 64, (2,), (2, 2), 2, 1, PRECISIONS[:1])
    base, large = "open_clip:ViT-B-32", "open_clip:ViT-L-14"
    return Sizes(
        torch.device("cuda"), base, large, "timm:resnet50", 8192, (60, 256, 512), (128, 32), 64, 5, PRECISIONS
    )


class Timed(NamedTuple):
    """Median time in milliseconds, and peak allocation in gigabytes (None on a CPU)."""

    ms: float
    gigabytes: float | None


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> Timed:
    """Time some work, after one call for warm-up."""
    cuda = device.type == "cuda"
    work()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(1000 * (time.perf_counter() - started))
    return Timed(statistics.median(found), torch.cuda.max_memory_allocated() / 1e9 if cuda else None)


class _Counted(TorchDispatchMode):
    """Counts the FLOPs of matrix products and convolutions, in forward and backward passes.

    torch's own `FlopCounterMode` tracks modules through the backward pass, and fails when `autograd.grad` returns the
    gradient of a leaf.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own is untyped
        self.operations = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=found)
        return found


def teraflops(work: Callable[[], object]) -> float:
    """TFLOPs of all matrix products and convolutions in some work, which runs once."""
    with _Counted() as counted:
        work()
    return float(counted.operations / 1e12)


def share(ms: float, operations: float, rates: Rates, precision: str) -> float | None:
    """Share of the measured rate at which this many TFLOPs were done."""
    peak = rates.get(precision)
    return None if not peak else operations / (ms / 1000) / peak


def launches(work: Callable[[], object], device: torch.device) -> int:
    """Number of kernels that some work launches on a GPU; on a CPU, number of torch operations."""
    cuda = device.type == "cuda"
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch") if cuda else ("aten::",)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        work()
        if cuda:
            torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.key.startswith(names))


def busy(work: Callable[[], object], device: torch.device) -> float:
    """Time of all kernels and copies over the time of some work; concurrent kernels count separately.

    On a CPU, the time of torch operations in this thread over the time of the work.
    """
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    events = found.key_averages()
    microseconds = sum(event.self_device_time_total if cuda else event.self_cpu_time_total for event in events)
    return float(microseconds) / 1e6 / seconds
