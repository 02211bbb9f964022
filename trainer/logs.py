"""Numbers of a run: `log.jsonl`, TensorBoard, and how much of the time went into waiting for data."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType

import click
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from storage_schemas import Location
from trainer.checkpoint import LOG


def say(message: str) -> None:
    """One line to the person in front, on stderr as all progress; of several processes the first speaks."""
    if _speaks():
        click.echo(message, err=True)


def warn(message: str) -> None:
    """A warning that should not be overlooked; of several processes the first gives it."""
    if _speaks():
        click.secho(f"WARNING: {message}", err=True, fg="yellow", bold=True)


def _speaks() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


class RunLog:
    """Appends to the logs of a run; a context manager.

    Args:
        folder: the run's folder.
        start: step the run continues after. Later lines of an earlier sitting are dropped from `log.jsonl`, and
            hidden in TensorBoard, so that every step occurs once.
    """

    def __init__(self, folder: Path, start: int) -> None:
        path = folder / LOG
        if path.exists():
            kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= start]
            Location(folder).write(LOG, b"".join(kept))
        self._stream = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._since = time.monotonic()
        self._waited, self._groups = 0.0, 0

    def count(self, groups: int, waited: float) -> None:
        """Report a step's groups and the seconds it waited for them."""
        self._groups += groups
        self._waited += waited

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Log the values of one step, with the rates since the last line."""
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        if "correction" in values and values["loss"] != 0:
            values = {**values, "correction_share": values["correction"] / values["loss"]}
        values = {**values, "groups_per_second": self._groups / elapsed, "data_wait": self._waited / elapsed}
        self._since, self._waited, self._groups = now, 0.0, 0
        self._stream.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def pause(self, seconds: float) -> None:
        """Leave time that was no training out of the rates."""
        self._since += seconds

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._board.close()


def _step(line: bytes) -> float:
    """Step of a log line; infinity for one that a crash cut short."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
