"""Artifacts with weights as one text each: `photos`, `photos=0.7`, `s3://bucket/photos=2`."""

from __future__ import annotations

import math
from typing import NamedTuple

from storage_schemas import shortened
from storage_schemas.access.local_paths import local_part, user_path

LARGEST_WEIGHT = 1000
FACTORY = "python:"


class Weighted(NamedTuple):
    """An artifact, and how often each of its groups occurs in an epoch."""

    url: str
    weight: float


def weighted(text: str) -> Weighted:
    """What a text means: an artifact, or an artifact, `=`, and its weight.

    A folder of this machine that is called so is meant, whatever follows its `=`; so is everything whose last `=`
    no number follows, and a factory, whose arguments have `=`. The place `s3://bucket/year=2024` is written
    `s3://bucket/year=2024=1`.

    Raises:
        ValueError: a weight that is not there, not above 0, or too large.
    """
    url, _, end = text.rpartition("=")
    if text.startswith(FACTORY):
        return Weighted(text, 1.0)
    if url and not end.strip() and not _is_here(text):
        raise ValueError(
            f"expected a weight after {shortened(text)}, found none; write one, as in {shortened(f'{text}0.5')}, "
            f"leave out the =, or write {shortened(f'{text}=1')} for what is called so"
        )
    try:
        weight = float(end) if url else math.nan
    except ValueError:
        return Weighted(text, 1.0)
    if not url or _is_here(text):
        return Weighted(text, 1.0)
    if not 0 < weight <= LARGEST_WEIGHT:
        raise ValueError(
            f"expected a weight above 0 and of at most {LARGEST_WEIGHT} for {url}, found {end}; choose another, or "
            f"write {shortened(f'{text}=1')} for what is called so"
        )
    return Weighted(url, weight)


def spelt(url: str, weight: float) -> str:
    """A text that means an artifact with a weight; the artifact alone where the weight is 1."""
    return url if weight == 1 and _is_plain(url) else f"{url}={weight:.15g}"


def _is_plain(url: str) -> bool:
    """Whether an artifact's name alone means it, with weight 1."""
    try:
        return weighted(url) == (url, 1)
    except ValueError:
        return False


def _is_here(text: str) -> bool:
    path = local_part(text)
    try:
        return path is not None and user_path(path).exists()
    except (OSError, ValueError):  # no path at all; opening it says why
        return False
