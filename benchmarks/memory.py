"""Memory of full-size encoders, each measured in a separate process.

    training   steps of the trainer with and without `grad_checkpointing`
                 kept   MB that autograd stores for one image until the backward pass, without parameters
                 peak   peak resident MB during the steps, with weights, gradients, AdamW's moments and libraries
    loading    `load_encoder`: seconds, and peak and remaining resident MB over the MB of the image tower's weights

Needs Linux, which can reset the peak of a process.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.report import Table
from benchmarks.training import make_artifact
from datamerge.encoders import load_encoder
from datamerge.runtime.checkout import commit
from trainer import TrainConfig
from trainer.data.order import WHOLE
from trainer.run.distributed import Processes
from trainer.run.forward import train_mode
from trainer.run.job import make_job
from trainer.run.recompute import recompute_activations
from trainer.run.update import Optimisation

MB = 2**20
MODELS = "open_clip:ViT-B-32,open_clip:ViT-L-14"


@click.group()
def main() -> None:
    """Memory benchmarks; each prints a Markdown table."""


@main.command()
@click.option("--encoders", default=MODELS, show_default=True, help="Comma-separated specs.")
@click.option("--batches", default="8,16", show_default=True, help="Comma-separated numbers of groups.")
@click.option("--steps", default=3, show_default=True, type=click.IntRange(1), help="The fastest one is timed.")
@click.option("--threads", default=2, show_default=True)
def training(encoders: str, batches: str, steps: int, threads: int) -> None:
    """Steps of the arm factors on the CPU, in float32."""
    _heading("training", encoders=encoders, batches=batches, steps=steps, threads=threads)
    rows = []
    for spec in encoders.split(","):
        for batch in batches.split(","):
            plain, again = (_alone("steps", spec, batch, steps, threads, on) for on in (0, 1))
            kept = f"{again['before']:,.0f} → {again['after']:,.0f}"
            peak, seconds = (f"{plain[name]:,.0f} → {again[name]:,.0f}" for name in ("peak", "seconds"))
            rows.append([spec, batch, kept, peak, seconds])
    columns = ("encoder", "batch", "kept of an image, MB", "peak, MB", "s a step")
    click.echo(Table("Without and with `grad_checkpointing`", columns, rows).markdown())


@main.command()
@click.option("--encoders", default=MODELS, show_default=True, help="Comma-separated specs.")
def loading(encoders: str) -> None:
    """Cost of loading an encoder."""
    _heading("loading", encoders=encoders)
    rows = []
    for spec in encoders.split(","):
        found = _alone("load", spec)
        sizes = [f"{found[name]:,.0f}" for name in ("weights", "peak", "left")]
        rows.append([spec, *sizes, f"{found['seconds']:.1f}"])
    click.echo(Table("`load_encoder`", ("encoder", "weights, MB", "peak, MB", "left, MB", "s"), rows).markdown())


def _heading(command: str, **options: Any) -> None:
    given = " ".join(f"--{name} {value}" for name, value in options.items())
    click.echo(
        f"`python -m benchmarks.memory {command} {given}`, commit {commit()}, {date.today()}, {platform.machine()} "
        f"CPU, torch {torch.__version__}\n"
    )


def _alone(task: str, *arguments: object) -> dict[str, float]:
    """Result of one of `TASKS`, run in a separate process."""
    command = [sys.executable, "-m", "benchmarks.memory", "alone", task, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


@main.command(hidden=True)
@click.argument("task")
@click.argument("arguments", nargs=-1)
def alone(task: str, arguments: tuple[str, ...]) -> None:
    """Run one of `TASKS` and print its result as JSON."""
    click.echo(json.dumps(TASKS[task](*arguments)))


def _steps(spec: str, batch: str, steps: str, threads: str, checkpoints: str) -> dict[str, float]:
    torch.set_num_threads(int(threads))
    with tempfile.TemporaryDirectory() as folder:
        artifact = make_artifact(Path(folder, "artifact"), spec, "zarr", int(batch), members=2, factors=1)
        config = TrainConfig(
            artifact=artifact,
            run=str(Path(folder, "run")),
            arm="factors",
            batch_size=int(batch),
            steps=int(steps),
            device="cpu",
            grad_checkpointing=bool(int(checkpoints)),
        )
        job = make_job(config)
        training, batches = Optimisation(job, Processes()), job.feed(WHOLE, 0, job.steps)
        _reset_peak()
        times = []
        for step in range(job.steps):
            started = time.perf_counter()
            training.step(step, batches, lambda: 0)
            times.append(time.perf_counter() - started)
        peak = _resident("VmHWM")
    found = {"peak": peak, "seconds": min(times)}
    if config.grad_checkpointing:
        encoder = load_encoder(spec)
        train_mode(encoder)
        kept = recompute_activations(encoder, torch.device("cpu"))
        found |= {"before": kept.before / MB, "after": kept.after / MB}
    return found


def _load(spec: str) -> dict[str, float]:
    before = _resident("VmRSS")
    _reset_peak()
    started = time.perf_counter()
    encoder = load_encoder(spec)
    seconds = time.perf_counter() - started
    weights = sum(tensor.nbytes for tensor in encoder.state_dict().values()) / MB
    left = _resident("VmRSS")
    # The kernel may update peak and current size at slightly different times.
    peak = max(_resident("VmHWM"), left)
    return {"seconds": seconds, "peak": peak - before, "left": left - before, "weights": weights}


TASKS: dict[str, Callable[..., dict[str, float]]] = {"steps": _steps, "load": _load}


def _reset_peak() -> None:
    """Reset the peak resident size of this process."""
    Path("/proc/self/clear_refs").write_text("5")


def _resident(field: str) -> float:
    """A field of /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


if __name__ == "__main__":
    main()
