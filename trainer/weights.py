"""Parse artifacts with weights, such as `photos`, `photos=0.7` and `s3://bucket/photos=2`."""

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
    """Parse ARTIFACT or ARTIFACT=WEIGHT; a missing weight is 1.

    The whole text is the artifact if a local path of that name exists, if it is a `python:` factory (whose arguments
    contain `=`), or if no number follows its last `=`. To name the remote folder `s3://bucket/year=2024`, write
    `s3://bucket/year=2024=1`.

    Raises:
        ValueError: the weight after `=` is empty, not above 0, or above `LARGEST_WEIGHT`.

    Examples:
        >>> weighted("s3://bucket/photos=0.5")
        Weighted(url='s3://bucket/photos', weight=0.5)
    """
    url, _, end = text.rpartition("=")
    if text.startswith(FACTORY):
        return Weighted(text, 1.0)
    if url and not end.strip() and not _is_here(text):
        raise ValueError(
            f"expected a weight after {shortened(text)}, found none; write one, as in {shortened(f'{text}0.5')}, "
            f"leave out the =, or write {shortened(f'{text}=1')} if the name itself ends in ="
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
            f"write {shortened(f'{text}=1')} if that is part of the name"
        )
    return Weighted(url, weight)


def spelt(url: str, weight: float) -> str:
    """The inverse of `weighted`: URL=WEIGHT, or the URL alone for weight 1."""
    return url if weight == 1 and _is_plain(url) else f"{url}={weight:.15g}"


def _is_plain(url: str) -> bool:
    """Whether `weighted` reads the name alone as this artifact with weight 1."""
    try:
        return weighted(url) == (url, 1)
    except ValueError:
        return False


def _is_here(text: str) -> bool:
    path = local_part(text)
    try:
        return path is not None and user_path(path).exists()
    except (OSError, ValueError):  # not a valid path; opening it reports the reason
        return False
