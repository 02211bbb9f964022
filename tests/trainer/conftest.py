"""Small artifacts to train on, and settings for all tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.support.training_artifacts import write_artifact

# On a busy machine the duration of an example says nothing about the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small would lose most of their time to the hand-over between threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_artifact(tmp_path: Path) -> Callable[..., str]:
    """A function that writes an artifact below tmp_path and returns its path.

    Its keyword arguments are `name` and the options of `write_artifact`.
    """

    def make(**options: Any) -> str:
        path = tmp_path / options.get("name", "artifact")
        write_artifact(path, options)
        return str(path)

    return make
