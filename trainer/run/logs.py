"""Logs of a run: `log.jsonl`, TensorBoard and W&B, including the share of time spent waiting for data."""

from __future__ import annotations

import json
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from storage_schemas import Location
from storage_schemas.access.atomic import writing
from trainer.errors import Stopped
from trainer.run.checkpoint import LOG
from trainer.run.wandb_log import WandbLog


class RunLog:
    """Appends to the logs of a run; a context manager.

    Args:
        folder: the run's folder.
        start: step after which the run continues. Later lines of an earlier session are dropped from `log.jsonl` and
            hidden in TensorBoard, so that every step occurs once.
        settings: settings of the run; with `wandb_project`, W&B receives the same numbers.
    """

    def __init__(self, folder: Path, start: int, settings: dict[str, Any]) -> None:
        project = settings["wandb_project"]
        self._path = path = folder / LOG
        with writing(path):
            self._wandb = WandbLog(folder, project, settings) if project is not None else None
            if path.exists():
                kept = [line for line in path.read_bytes().splitlines(keepends=True) if _step(line) <= start]
                Location(folder).write(LOG, b"".join(kept))
            self._stream = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)
        self._hook = threading.excepthook
        threading.excepthook = self._without_boards
        self._since = time.monotonic()
        self._waited, self._groups = 0.0, 0

    def count(self, groups: int, waited: float) -> None:
        """Count a step's groups and the seconds it waited for them."""
        self._groups += groups
        self._waited += waited

    def write(self, step: int, epoch: int, values: dict[str, float]) -> None:
        """Log the values of one step, with the rates since the last line.

        Raises:
            DatamergeError: the disk is full.
        """
        now = time.monotonic()
        elapsed = max(now - self._since, 1e-9)
        if "correction" in values and values["loss"] != 0:
            values = {**values, "correction_share": values["correction"] / values["loss"]}
        values = {**values, "groups_per_second": self._groups / elapsed, "data_wait": self._waited / elapsed}
        self._since, self._waited, self._groups = now, 0.0, 0
        with writing(self._path):
            self._stream.write(json.dumps({"step": step, "epoch": epoch, **values}) + "\n")
            self._stream.flush()
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def pause(self, seconds: float) -> None:
        """Exclude seconds that were not training from the rates."""
        self._since += seconds

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as closing:
            closing.callback(setattr, threading, "excepthook", self._hook)
            if error is not None:  # an error of closing, perhaps from the same full disk, would hide it
                closing.enter_context(suppress(Exception))
            closing.enter_context(writing(self._path))
            closing.callback(self._board.close)
            closing.callback(self._stream.close)
        if self._wandb is not None:
            # An orderly stop is not a failure; the run may continue later.
            self._wandb.close(error is not None and not isinstance(error, Stopped))

    def _without_boards(self, failure: threading.ExceptHookArgs) -> None:
        """Print exceptions of threads, except TensorBoard's, which `write` raises again."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self._hook(failure)


def _step(line: bytes) -> float:
    """Step of a log line; infinity for an incomplete line, as after a crash."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
