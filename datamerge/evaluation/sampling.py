"""Random subsets of a list, drawn as FARE draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def draw(items: Sequence[T], count: int, seed: int) -> list[T]:
    """`count` of the items in the order of numpy's `choice` without replacement after `numpy.random.seed(seed)`."""
    chosen = np.random.RandomState(seed).choice(len(items), count, replace=False)
    return [items[index] for index in chosen.tolist()]
