"""The CPUs that this process may use; in a container or a Slurm job, fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Number of CPUs that this process may use, at least 1: those of its affinity, limited by its cgroup's quota.

    `os.cpu_count()` counts the machine's CPUs, even in a container that gets two of 96.

    Args:
        root: root of the file system, for tests.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min(cpus, _cgroup_share(root))))


def _cgroup_share(root: Path) -> float:
    """The smallest CPU quota of this process's cgroup and its ancestors; infinite without one.

    Version 2 has a file `cpu.max` with `QUOTA PERIOD` in microseconds; version 1 has one file for each.
    """
    shares = [math.inf]
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / (controllers and "cpu")
        folder = top / path.strip("/")
        # In a container the path is often the host's and does not exist here; the container's cgroup is at the top.
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
