"""What this process may use of its machine: in a container or a Slurm job that is less than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """CPUs that this process may keep busy, at least 1: those it may run on, and no more than its cgroup's share.

    `os.cpu_count()` gives those of the machine, also in a container that gets two of its 96.

    Args:
        root: of the file system, for tests.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cpus, _cgroup_share(root))))


def _cgroup_share(root: Path) -> float:
    """The smallest share of CPUs of this process's cgroup and of those above it; infinite where there is none.

    Version 2 has `cpu.max`, with `QUOTA PERIOD` in microseconds; version 1 a file for each.
    """
    shares = [math.inf]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and "cpu")
        folder = top / path.strip("/")
        # In a container the path is often that of the host, which is not there; its own cgroup is then the top.
        for place in {top, *(p for p in (folder, *folder.parents) if p.is_relative_to(top))}:
            quota, period = (*_text(place / "cpu.max").split(), "", "")[:2]
            if controllers:
                quota, period = _text(place / "cpu.cfs_quota_us"), _text(place / "cpu.cfs_period_us")
            if quota.strip().isdigit() and period.strip().isdigit() and int(period):
                shares.append(int(quota) / int(period))
    return min(shares)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
