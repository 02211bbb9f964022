"""Tests that need a GPU, which `make gpu` runs.

Elsewhere those that take `device` run on the CPU, so that a GPU is not the first to run them; the others are skipped
and say so. Those that start several processes take too long for that, unless DATAMERGE_REHEARSE is 1.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training_artifacts import write_artifact

HERE = Path(__file__).parent
REHEARSE = os.environ.get("DATAMERGE_REHEARSE") == "1"


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder is marked; without a GPU it is skipped."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        taken = getattr(item, "fixturenames", ())
        rehearsed = "device" in taken and (REHEARSE or "several_processes" not in taken)
        if not torch.cuda.is_available() and not rehearsed:
            item.add_marker(pytest.mark.skip(reason="no GPU to be seen here; `make gpu` runs it where there is one"))


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., str]:
    """A function that writes an artifact to train on below tmp_path and returns its path."""

    def make(**options: Any) -> str:
        path = tmp_path / options.get("name", "artifact")
        write_artifact(path, options)
        return str(path)

    return make


@pytest.fixture
def device() -> torch.device:
    """The GPU, or the CPU in a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def several_processes() -> None:
    """Taken by tests that start more than one."""


@pytest.fixture
def waits(device: torch.device) -> Callable[[Callable[[], object]], list[str]]:
    """A function: the places at which some work waits for the GPU. In a rehearsal there are none."""

    def count(work: Callable[[], object]) -> list[str]:
        if device.type == "cpu":
            work()
            return []
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return [f"{one.filename}:{one.lineno}" for one in caught if "synchroniz" in str(one.message)]

    return count
