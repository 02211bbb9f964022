"""Random numbers of one step: a stream for every group, so that a group's draws depend on nothing around it.

Neither the size of a micro-batch, nor the number of processes, nor the device changes them: they are drawn on
the CPU in float64 and converted. Group p of global step s owns the stream of word p of
SeedSequence([seed, ESTIMATOR, s]) (`trainer.data.order` names the purposes).

Shapes: B groups; `like` is a tensor [B, …] whose shape, dtype and device the result has.
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
        """Independent on [−1, 1]: the 2^16 midpoints of equal intervals, in half the bytes of float32."""
        count = like[0].numel()
        drawn = [np.frombuffer(rng.bytes(2 * count), "<i2") for rng in self._of(like)]
        levels = _moved(torch.from_numpy(np.stack(drawn).astype(np.int16, copy=False)), like)
        return ((levels.to(like.dtype) + 0.5) / 2**15).reshape(like.shape)

    def signs(self, like: Tensor) -> Tensor:
        """Independent −1 or +1 (Rademacher): mean 0, variance 1 and, of all such laws, the smallest 4th moment."""
        count = like[0].numel()
        packed = [np.frombuffer(rng.bytes(-(-count // 8)), np.uint8) for rng in self._of(like)]
        # One bit a value crosses to the device.
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
    """Values as they are on the device of `like`; a GPU is not waited for."""
    if like.is_cuda:
        return values.pin_memory().to(like.device, non_blocking=True)
    return values.to(like.device)


def _signs_of_bytes(like: Tensor) -> Tensor:
    """The eight bits of every byte, the highest first, as −1 and +1: [256, 8]."""
    every, places = (torch.arange(count, device=like.device) for count in (256, 8))
    bits = (every[:, None] >> (7 - places)) & 1
    return 2 * bits.to(like.dtype) - 1
