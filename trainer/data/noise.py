"""Random numbers of one step: every group has its own stream, so its draws do not depend on other groups.

The numbers do not depend on micro-batch size, number of processes or device: they are drawn on the CPU and
converted. Group p of global step s is seeded with word p of SeedSequence([seed, ESTIMATOR, s]); `trainer.data.order`
defines the purposes.

Shapes: B groups; the result has the shape [B, …], dtype and device of the argument `like`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional


class Draws:
    """One NumPy generator per group; each call advances them.

    Args:
        seeds: 64-bit seeds, one per group.

    Examples:
        >>> Draws([1, 2]).signs(torch.zeros(2, 3)).abs()
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [np.random.default_rng(seed) for seed in seeds]

    def normal(self, like: Tensor) -> Tensor:
        """Independent N(0, 1)."""
        return self._stack([rng.standard_normal(like[0].numel()) for rng in self._of(like)], like)

    def exponential(self, like: Tensor) -> Tensor:
        """Independent Exp(1)."""
        return self._stack([rng.standard_exponential(like[0].numel()) for rng in self._of(like)], like)

    def uniform(self, like: Tensor) -> Tensor:
        """Independent and uniform over the midpoints of 2^16 equal intervals of [−1, 1].

        Only 16 bits a number are drawn and copied to the device, half of float32.
        """
        count = like[0].numel()
        drawn = [np.frombuffer(rng.bytes(2 * count), "<i2") for rng in self._of(like)]
        levels = _moved(torch.from_numpy(np.stack(drawn).astype(np.int16, copy=False)), like)
        return ((levels.to(like.dtype) + 0.5) / 2**15).reshape(like.shape)

    def signs(self, like: Tensor) -> Tensor:
        """Independent −1 or +1 (Rademacher): mean 0, variance 1 and, of all such laws, the smallest 4th moment."""
        count = like[0].numel()
        packed = [np.frombuffer(rng.bytes(-(-count // 8)), np.uint8) for rng in self._of(like)]
        # Only one bit per value is copied to the device.
        eights = functional.embedding(_moved(torch.from_numpy(np.stack(packed)), like).int(), _signs_of_bytes(like))
        return eights.flatten(1)[:, :count].reshape(like.shape)

    def _of(self, like: Tensor) -> list[np.random.Generator]:
        if len(like) != len(self._generators):
            raise ValueError(f"expected one seed a group, found {len(self._generators)} for {len(like)} groups")
        return self._generators

    @staticmethod
    def _stack(rows: list[np.ndarray[tuple[int, ...], np.dtype[np.float64]]], like: Tensor) -> Tensor:
        return _moved(torch.from_numpy(np.stack(rows)).to(like.dtype), like).reshape(like.shape)


def _moved(values: Tensor, like: Tensor) -> Tensor:
    """Values on the device of `like`, copied without waiting for a GPU."""
    if like.is_cuda:
        return values.pin_memory().to(like.device, non_blocking=True)
    return values.to(like.device)


def _signs_of_bytes(like: Tensor) -> Tensor:
    """Table of the bits of every byte, highest first, as −1 and +1: [256, 8]."""
    every, places = (torch.arange(count, device=like.device) for count in (256, 8))
    bits = (every[:, None] >> (7 - places)) & 1
    return 2 * bits.to(like.dtype) - 1
