"""One reader of a stream, in a separate process; prints a line at the start, a line per batch, then a summary.

python -m benchmarks.streaming_reader URL --steps 64 --cache DIR
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import click
import torch

from benchmarks.remote_server import Remote
from trainer import TrainConfig
from trainer.data.order import WHOLE
from trainer.run.job import make_job

BATCH = 32
FIRST_WINDOW = 8  # batches
S3 = {
    "AWS_ACCESS_KEY_ID": "KEY",
    "AWS_SECRET_ACCESS_KEY": "SECRET",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@dataclass
class Seen:
    """Output of a reader.

    Attributes:
        started: time at which it began to open the artifact, by the machine's clock.
        batches: (arrival time, seconds of waiting) of each batch.
        cpu: CPU seconds of all its processes until the last batch, without start-up and imports.
        peak: peak MB of its main process.
    """

    started: float = 0.0
    batches: list[tuple[float, float]] = field(default_factory=list)
    cpu: float = 0.0
    peak: float = 0.0

    @property
    def first(self) -> float:
        """Seconds to the first batch."""
        return self.batches[0][0] - self.started

    def speed(self, steps: int) -> float:
        """Groups per second of the first `steps` steps; they include opening the artifact."""
        return steps * BATCH / (self.batches[steps - 1][0] - self.started)

    def later(self, steps: int) -> float:
        """Groups per second after the first `steps` steps."""
        return (len(self.batches) - steps) * BATCH / (self.batches[-1][0] - self.batches[steps - 1][0])

    def waiting(self) -> float:
        """Fraction of the time after the first window that was spent waiting."""
        waits = [wait for _, wait in self.batches[FIRST_WINDOW:]]
        return sum(waits) / (self.batches[-1][0] - self.batches[FIRST_WINDOW - 1][0])


@click.command()
@click.argument("url")
@click.option("--steps", default=64, show_default=True)
@click.option("--start", default=0, show_default=True, help="First step.")
@click.option("--pause", default=0.0, show_default=True, help="Seconds that the consumer spends on a batch.")
@click.option("--workers", default=0, show_default=True)
@click.option("--cache", default="none", show_default=True)
def main(url: str, steps: int, start: int, pause: float, workers: int, cache: str) -> None:
    """Read the steps [start, steps) of a run."""
    torch.set_num_threads(1)
    before, began = _cpu(), time.monotonic()
    config = TrainConfig(
        artifact=url,
        run=f"{cache}-run",
        arm="factors",
        batch_size=BATCH,
        steps=steps,
        data_workers=workers,
        cache=cache,
    )
    batches = make_job(config).feed(WHOLE, start, steps)
    report(began, batches, pause)
    click.echo(json.dumps({"cpu": _cpu() - before, "peak": _peak()}))


def report(began: float, batches: Iterable[object], pause: float) -> None:
    """Print the arrival time of each batch and the seconds spent waiting for it."""
    click.echo(json.dumps(began))
    asked = began
    for _ in batches:
        now = time.monotonic()
        click.echo(json.dumps([now, now - asked]))
        sys.stdout.flush()
        time.sleep(pause)
        asked = time.monotonic()


def _cpu() -> float:
    return sum(os.times()[:4])


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def seen(command: list[str], environment: Mapping[str, str], kill_after: int | None = None) -> Seen:
    """Run a reader, and optionally kill it after a number of batches."""
    found = Seen()
    # stderr goes to a file: a pipe that is not read would fill up.
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        for line in process.stdout or ():
            said = json.loads(line)
            if isinstance(said, dict):
                found.cpu, found.peak = said["cpu"], said["peak"]
            elif isinstance(said, list):
                found.batches.append((said[0], said[1]))
            else:
                found.started = said
            if len(found.batches) == kill_after:
                process.kill()
                return found
        if process.wait():
            errors.seek(0)
            raise click.ClickException(errors.read().decode()[-2000:])
    return found


def ours(url: str, remote: Remote | None, options: Mapping[str, object], kill_after: int | None = None) -> Seen:
    """Run a reader of an artifact, see `main`; `remote` is the endpoint of S3."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    endpoint = {} if remote is None else {"AWS_ENDPOINT_URL": remote.url}
    command = [sys.executable, "-m", "benchmarks.streaming_reader", url, *arguments]
    return seen(command, {**S3, **endpoint}, kill_after)


if __name__ == "__main__":
    main()
