"""Progress on stderr: a bar on a terminal, a line every ten seconds in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from datamerge.runtime.messages import quiet

LOG_EVERY = 10.0


class Progress:
    """Reports progress of `total` units of work on stderr, unless quiet; a context manager.

    Args:
        what: verb shown in front, e.g. ``merge``.
        total: number of units.
        unit: name of a unit in the rate, e.g. ``groups``.
        done: units finished by an earlier run.
    """

    def __init__(self, what: str, total: int, unit: str, done: int = 0) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._done, self._before = done, done
        self._start = self._logged = time.monotonic()
        console = Console(file=sys.stderr)
        self._quiet = quiet()
        self._bar: RichProgress | None = None
        if console.is_terminal and not self._quiet:
            self._bar = RichProgress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}  {task.fields[note]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(what, total=total, completed=done, rate="", note="")

    def advance(self, units: int, note: str = "") -> None:
        """Report `units` more as finished, with a short remark such as the current loss."""
        self._done += units
        now = time.monotonic()
        rate = (self._done - self._before) / max(now - self._start, 1e-9)
        text = f"{rate:.1f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=text, note=note)
        elif not self._quiet and (now - self._logged >= LOG_EVERY or self._done >= self._total):
            self._logged = now
            left = (self._total - self._done) / max(rate, 1e-9)
            line = f"{self._what}: {self._done}/{self._total} {self._unit}, {text}, {left:.0f} s left"
            sys.stderr.write(f"{line}  {note}\n" if note else f"{line}\n")
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
