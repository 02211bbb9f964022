"""Tests for a GPU, which `make gpu` runs.

Without a GPU, those with the fixture `device` run on the CPU, as a rehearsal; the others are skipped with a message.
Those that start several processes take long and are rehearsed only if DATAMERGE_REHEARSE is 1.
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


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test in this folder; skip those that can neither run on a GPU nor be rehearsed."""
    for item in items:
        if HERE not in item.path.parents:
            continue
        item.add_marker(pytest.mark.gpu)
        fixtures = getattr(item, "fixturenames", ())
        rehearsed = "device" in fixtures and (REHEARSE or "several_processes" not in fixtures)
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
    """Used by tests that start more than one."""


@pytest.fixture
def waits(device: torch.device) -> Callable[[Callable[[], object]], list[str]]:
    """A function that returns the lines at which some work waits for the GPU; in a rehearsal there are none."""

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
