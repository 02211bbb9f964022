"""Randomness of a group: a function of the artifact's seed and the group's key alone, never of order or workers."""

from __future__ import annotations

import hashlib

import numpy as np


def group_seed(seed: int, key: str) -> np.random.SeedSequence:
    """Source of all that is random about group `key`; members spawn from it."""
    words = np.frombuffer(hashlib.sha256(key.encode()).digest()[:16], "<u4")
    return np.random.SeedSequence([seed, *(int(word) for word in words)])
