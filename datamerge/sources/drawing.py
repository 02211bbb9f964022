"""Limits a source to some samples: drawn evenly over it, or the first ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from storage_schemas import ConfigError
from storage_schemas.schema.arguments import check_count, check_not_negative
from storage_schemas.schema.seeds import LIMIT, purpose_seed


@dataclass(frozen=True)
class Limits:
    """The number of samples to use, and how to choose them.

    Attributes:
        drawn: number of samples to draw, one from each of that many equal runs of the source, so that a source
            sorted by class gives samples of all classes.
        first: number of samples to take from the start.
        seed: seed of the draw.

    Raises:
        ConfigError: a number is below 1, both are given, or the seed is negative.
    """

    drawn: int | None = None
    first: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, count in (("limit", self.drawn), ("limit_first", self.first)):
            if count is not None:
                check_count(name, count)
        check_not_negative("seed", self.seed)
        if None not in (self.drawn, self.first):
            raise ConfigError(f"limit_first: expected no other limit, found `limit={self.drawn}`; drop one of them")

    def of(self, total: int) -> npt.NDArray[np.int64] | None:
        """Ascending indices of the chosen samples of `total`; None for all."""
        count = self.first if self.drawn is None else self.drawn
        if count is None or count >= total:
            return None
        if self.drawn is None:
            return np.arange(count)
        ends = np.arange(count + 1) * total // count
        return np.random.default_rng(purpose_seed(self.seed, LIMIT)).integers(ends[:-1], ends[1:])


EVERYTHING = Limits()
