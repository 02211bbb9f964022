"""CPU time of the host while it holds the encoder's lock, when a fast GPU would be idle.

    host = thread time under the lock − that of `Attacker.attack`

`attack` consists of device kernels, for the encoder's passes and for operations on pixels: on a CPU they take thread
time, on a GPU only their launches do. The encoder is minimal, an `mlp` of one layer on 3 × 224 × 224 pixels. Thread
time does not include other processes. `beside` is the thread time of the worker's other thread in the same runs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

import click
import torch

from benchmarks.merge_scaling import make_photos, make_prepared, make_writer
from merge_service.adversarial_groups import Attacker
from merge_service.merge import worker_setup
from merge_service.worker import ShardWorker

SIZE = 224


class Clock:
    """Measures the thread time of wrapped calls, in seconds; for one thread at a time."""

    def __init__(self) -> None:
        self.seconds = self._started = 0.0

    def __enter__(self) -> None:
        self._started = time.thread_time()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds += time.thread_time() - self._started

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **settings: Any) -> Any:
            with self:
                return function(*arguments, **settings)

        return timed


@click.command()
@click.option("--groups", default=24, show_default=True)
@click.option("--members", default=10, show_default=True)
@click.option("--factors", default=1, show_default=True)
@click.option("--factor-kind", default="sketch", show_default=True)
@click.option("--steps", default=1, show_default=True)
@click.option("--repeats", default=5, show_default=True)
def main(groups: int, members: int, factors: int, factor_kind: str, steps: int, repeats: int) -> None:
    """Print milliseconds per group: medians of repeats, with minimum and maximum."""
    settings = {
        "members": members,
        "steps": steps,
        "groups_per_shard": groups,
        **({"factors": factors, "factor_kind": factor_kind} if factors else {}),
    }
    found = measure(groups, settings, repeats)
    for name, values in found.items():
        low, high = 1000 * min(values), 1000 * max(values)
        click.echo(f"{name:12} {1000 * statistics.median(values):8.2f} ms a group ({low:.2f} to {high:.2f})")


def measure(groups: int, settings: dict[str, Any], repeats: int, size: int = SIZE) -> dict[str, list[float]]:
    """Seconds per group of the host's and the device's work under the lock, and of the other thread."""
    found: dict[str, list[float]] = {"host": [], "device": [], "beside": []}
    with tempfile.TemporaryDirectory(prefix="datamerge-benchmark-") as folder:
        photos = make_photos(Path(folder) / "photos.npz", groups, size)
        shared = {"encoder": f"mlp:3x{size}x{size}-2", "device": "cpu", "format": "webdataset"}
        prepared = make_prepared(photos, Path(folder), {**shared, **settings})
        for _ in range(repeats + 1):
            writer = make_writer(prepared)
            for sidecar in writer.committed():
                Path(folder, "artifact", "commits", f"{sidecar:05d}.json").unlink()
            worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
            worker.prepare()
            lock, device, beside = Clock(), Clock(), Clock()
            with ExitStack() as stack:
                stack.enter_context(patch.object(worker, "_attack_lock", lock))
                for name, clock in (
                    ("attack", device),
                    ("inputs", beside),
                    ("records", beside),
                ):
                    stack.enter_context(patch.object(Attacker, name, clock.around(getattr(Attacker, name))))
                worker.run(prepared.plan.task(0))
            found["host"].append((lock.seconds - device.seconds) / groups)
            found["device"].append(device.seconds / groups)
            found["beside"].append(beside.seconds / groups)
    torch.set_num_threads(1)
    return {name: values[1:] for name, values in found.items()}  # the first one warms up


if __name__ == "__main__":
    main()
