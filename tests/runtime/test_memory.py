"""Recognising out-of-memory errors, measuring free memory, and the memory that gradients need."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from datamerge.runtime.memory import free_memory, is_out_of_memory, saved_for_backward

MB = 2**20


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDNN: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("shapes do not match"), False),
        (OSError("out of memory"), False),
    ],
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def _system(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    """A forged /proc and /sys of a machine with 8000 kB available."""
    files = {"proc/meminfo": "MemTotal: 16000 kB\nMemAvailable: 8000 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "9:name=systemd:/\n4:cpu,memory:/jobs/one\n0::/\n"


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("0::/\n", {}, 8000 * 2**10),
        ("0::/jobs\n", {"jobs/memory.max": "max", "jobs/memory.current": "5", "jobs/memory.stat": ""}, 8000 * 2**10),
        # The kernel can drop inactive files from its cache, so they count as free.
        (
            "0::/jobs/one\n",
            {
                "jobs/one/memory.max": "1000",
                "jobs/one/memory.current": "900",
                "jobs/one/memory.stat": "anon 5\ninactive_file 300\n",
            },
            400,
        ),
        # The limit of the parent, which is exceeded.
        (
            "0::/jobs/one\n",
            {"jobs/memory.max": "100", "jobs/memory.current": "150", "jobs/memory.stat": "inactive_file 20\n"},
            0,
        ),
        # Version 1 inside a container: the path is the host's, and the group is at the mount point.
        (
            V1,
            {
                "memory/memory.limit_in_bytes": "5000",
                "memory/memory.usage_in_bytes": "1000",
                "memory/memory.stat": "inactive_file 7\ntotal_inactive_file 8\n",
            },
            4008,
        ),
    ],
)
def test_free_memory_is_the_least_of_machine_and_containers(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int
) -> None:
    root = _system(tmp_path, cgroup, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert free_memory(root) == expected


def test_free_memory_is_unknown_on_other_systems(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


def test_free_memory_of_this_machine_is_known() -> None:
    if sys.platform == "linux":
        assert (free_memory() or 0) > 10 * MB


def test_saved_for_backward_lists_what_autograd_keeps() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 20), nn.Sigmoid()).requires_grad_(False)
    pixels = torch.rand(3, 100, requires_grad=True)
    outputs, kept = saved_for_backward(model, lambda: model(pixels))
    # Weights do not count; ReLU and the sigmoid keep their results.
    assert sorted(kept) == [4 * 3 * 20, 4 * 3 * 50]
    assert torch.equal(outputs, model(pixels))
    with torch.no_grad():
        assert saved_for_backward(model, lambda: model(pixels))[1] == []
