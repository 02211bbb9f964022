"""What all parts of `benchmarks.gpu` share: rows, sizes, and how time, operations and kernels are counted."""

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
"""By precision, TFLOP/s of a large matrix product on this GPU."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        part, what: its name.
        ms: milliseconds.
        share: of the rate of a matrix product in the same precision, counting all products and convolutions.
        rate, unit: so much a second.
        gigabytes: largest allocation on the GPU.
        failed: it could not be measured; `what` says why.
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
        """Of its row in the table."""
        rate = "" if self.rate is None else f"{self.rate:.4g} {self.unit}"
        numbers = ("" if self.ms is None else f"{self.ms:.4g}", "" if self.share is None else f"{self.share:.0%}")
        return [self.part, self.what, *numbers, rate, "" if self.gigabytes is None else f"{self.gigabytes:.2f}"]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """Raises ValueError for a line that is none."""
        values = json.loads(line)
        if not isinstance(values, dict) or "part" not in values:
            raise ValueError(f"no row: {line!r}")
        return cls(**values)


@dataclass(frozen=True)
class Sizes:
    """Of all parts.

    Attributes:
        base, large, convolutional: encoders.
        side: of the matrices.
        images: attacked at once.
        batch: groups a step, with the base and the large encoder.
        groups: that are read, and merged in a shard.
        precisions: that attacks and training are timed in.
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
    """Those of a GPU, or of a rehearsal."""
    if rehearse:
        tiny = "mlp:3x32x32-16-8"
        return Sizes(torch.device("cpu"), tiny, tiny, "timm:test_resnet", 64, (2,), (2, 2), 2, 1, PRECISIONS[:1])
    base, large = "open_clip:ViT-B-32", "open_clip:ViT-L-14"
    return Sizes(
        torch.device("cuda"), base, large, "timm:resnet50", 8192, (60, 256, 512), (128, 32), 64, 5, PRECISIONS
    )


class Timed(NamedTuple):
    """Median milliseconds, and the most gigabytes that were allocated meanwhile, None on a CPU."""

    ms: float
    gigabytes: float | None


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> Timed:
    """Time some work; done once before, to warm up."""
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
    """Adds up the operations of products and convolutions, backward ones too.

    torch's own `FlopCounterMode` follows modules through the backward pass, and fails where `autograd.grad` is asked
    for a leaf.
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
    """Of all products and convolutions in some work, which is done once."""
    with _Counted() as counted:
        work()
    return float(counted.operations / 1e12)


def share(ms: float, operations: float, rates: Rates, precision: str) -> float | None:
    """Of the measured rate, for so many teraflops."""
    peak = rates.get(precision)
    return None if not peak else operations / (ms / 1000) / peak


def launches(work: Callable[[], object], device: torch.device) -> int:
    """Kernels that some work starts on a GPU; on a CPU, the operations of torch in it."""
    cuda = device.type == "cuda"
    names = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch") if cuda else ("aten::",)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        work()
        if cuda:
            torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.key.startswith(names))


def busy(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of kernels and copies over those of some work, of all threads; what runs side by side counts twice.

    On a CPU, of the operations of torch in this thread.
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
