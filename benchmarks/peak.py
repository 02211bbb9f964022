"""Peak memory of a command and all processes that it starts."""

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
    """Result of a command.

    Attributes:
        returncode: exit code.
        stdout: standard output.
        stderr: standard error.
        seconds: wall time.
        tree: peak memory of all its processes together, in MB; shared memory counts once.
        process: peak memory of any single process, shared memory included, in MB.
    """

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    tree: float
    process: float


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Run a command to its end and measure its memory from /proc; Linux only.

    Args:
        command: the command and its arguments.
        environment: environment variables in addition to those of this process.
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
    """Samples the memory of a process tree, in kB, until it is stopped."""

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
    except OSError:  # the process has ended
        return 0


def _field(pid: int, file: str, name: str) -> int:
    """A field in kB; 0 for a process that has ended."""
    try:
        lines = (PROC / str(pid) / file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
