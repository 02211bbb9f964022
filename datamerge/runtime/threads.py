"""Sets the number of torch's CPU threads for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from datamerge.runtime.machine import usable_cpus


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """Inside, torch computes with `number` CPU threads; the previous number is restored afterwards.

    None means torch's current number, but no more than the CPUs that the process may use: torch starts one thread per
    CPU of the machine, of which a container may have a small share.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, usable_cpus()) if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
