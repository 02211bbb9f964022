"""Random seeds that depend on the artifact's seed and a string alone, never on workers or on earlier draws."""

from __future__ import annotations

import hashlib

import numpy as np

# Purposes of draws for the artifact as a whole. Their spaces distinguish them from keys of groups.
ORDER, LIMIT = "order of groups", "limit of samples"


def group_seed(seed: int, key: str) -> np.random.SeedSequence:
    """Seed of everything random in group `key`; members spawn from it."""
    return _seed(seed, key)


def purpose_seed(seed: int, purpose: str) -> np.random.SeedSequence:
    """Seed of the draws for a purpose, `ORDER` or `LIMIT`."""
    return _seed(seed, purpose)


def _seed(seed: int, text: str) -> np.random.SeedSequence:
    words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], "<u4")
    return np.random.SeedSequence([seed, *(int(word) for word in words)])
