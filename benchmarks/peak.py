"""The memory of a command and all processes that it starts."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
INTERVAL = 0.2


@dataclass(frozen=True)
class Ran:
    """A command that has ended.

    Attributes:
        returncode: its exit code.
        stdout: what it printed.
        stderr: likewise.
        seconds: of wall time.
        tree: greatest sum of the memory of all its processes at one time, in MB; what they share counts once.
        process: greatest memory of any single one of them, what it shares included, in MB.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    tree: float
    process: float


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Run a command to its end and watch its memory. Linux alone says what is needed for that, in /proc.

    Args:
        command: and its arguments.
        environment: variables besides those of this process.
    """
    started = time.perf_counter()
    with subprocess.Popen(
        command, env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        watch = _Watch(process.pid)
        watch.start()
        stdout, stderr = process.communicate()
        seconds = time.perf_counter() - started
        watch.ended.set()
        watch.join()
    return Ran(process.returncode, stdout, stderr, seconds, watch.tree / 1024, watch.process / 1024)


class _Watch(threading.Thread):
    """Looks at a tree of processes until it is told that the first of them has ended; figures in kB."""

    def __init__(self, root: int) -> None:
        super().__init__(daemon=True)
        self.root, self.ended = root, threading.Event()
        self.tree = self.process = 0

    def run(self) -> None:
        while not self.ended.wait(INTERVAL):
            processes = _tree(self.root)
            self.tree = max(self.tree, sum(_field(pid, "smaps_rollup", "Pss") for pid in processes))
            self.process = max(self.process, *(_field(pid, "status", "VmHWM") for pid in processes))


def _tree(root: int) -> list[int]:
    """The process and its descendants."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            children[_parent(entry)].append(int(entry.name))
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def _parent(entry: Path) -> int:
    try:
        # The second field is a name in brackets, which may hold brackets and spaces.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # it has ended
        return 0


def _field(pid: int, file: str, name: str) -> int:
    """A figure in kB; 0 of a process that has ended."""
    try:
        lines = (PROC / str(pid) / file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
