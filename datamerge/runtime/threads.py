"""How many CPU threads torch computes with, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from datamerge.runtime.machine import usable_cpus


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """This many CPU threads inside; a caller from Python gets its own number back.

    If None as many as torch has now, and no more than the CPUs that the process may use: torch starts with one for
    each of the machine, of which a container may have a small share.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_cpus()) if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
