"""Randomness as a function of the artifact's seed and a text alone, never of workers or of what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np

# What is drawn for an artifact as a whole. The spaces keep them apart from the keys of groups.
ORDER, LIMIT = "order of groups", "limit of samples"


def group_seed(seed: int, key: str) -> np.random.SeedSequence:
    """Source of all that is random about group `key`; members spawn from it."""
    return _seed(seed, key)


def purpose_seed(seed: int, purpose: str) -> np.random.SeedSequence:
    """Source of what is drawn for a purpose, `ORDER` or `LIMIT`."""
    return _seed(seed, purpose)


def _seed(seed: int, text: str) -> np.random.SeedSequence:
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u4")
    return np.random.SeedSequence([seed, *(int(word) for word in words)])
