"""Sum gradients over processes, in buckets that are sent while the backward pass still runs.

Parameters are split into buckets from the last one to the first, about the order in which a backward pass reaches
them. In the last backward pass of a step each bucket is sent as soon as it and all before it are complete; the
remaining ones follow at the end, with the numbers that all processes must agree on. So every process sends the same
buckets in the same order, whatever it computes; a process without groups sends all of them at the end. The rounding
of the sums depends on the buckets, and so on the parameters alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from storage_schemas import DatamergeError
from trainer.run.distributed import Processes, Work

BUCKET_BYTES = 25 * 2**20  # as in DistributedDataParallel: large enough for bandwidth, small beside an encoder


class Exchange:
    """Sums the gradients of a step over all processes.

    Attributes:
        own: this process among those of the run.
        parameters: parameters whose gradients are summed.
        buckets: the parameters in buckets, in the order in which they are sent.
    """

    def __init__(self, own: Processes, parameters: Sequence[nn.Parameter]) -> None:
        self.own, self.parameters = own, parameters
        self.buckets = _cut(parameters)
        self._sent: list[tuple[Tensor, Work]] = []
        # Parameters of each bucket whose gradient is not complete yet; empty outside `sending`.
        self._missing: list[set[Tensor]] = []
        if own.world == 1:
            return
        # These hooks run when `.grad` is accumulated, so never in the estimators' calls of `torch.autograd.grad`.
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    @contextmanager
    def sending(self, last: bool) -> Iterator[None]:
        """Send buckets as the backward pass inside completes them.

        If that pass fails and is repeated outside, the buckets that were sent remain valid.

        Args:
            last: whether this pass completes the gradients of the step; otherwise nothing is sent.

        Raises:
            DatamergeError: a gradient changed after it was sent.
        """
        if last and self.own.world > 1:
            self._missing = [set(bucket) for bucket in self.buckets]
        try:
            yield
        finally:
            self._missing = []

    def finish(self, numbers: Tensor) -> Tensor:
        """Send the remaining buckets, and replace all gradients by their sums.

        Args:
            numbers: a vector of further numbers to sum, on the same device.

        Returns:
            The sums of `numbers`; with several processes, followed by the number of processes in which each parameter
            had a gradient.

        Raises:
            DatamergeError: another process has died.
        """
        if self.own.world == 1:
            return numbers
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=numbers.dtype)
        numbers = torch.cat([numbers, used.to(numbers.device, non_blocking=True)])
        self.own.meet()
        for bucket in self.buckets[len(self._sent) :]:
            # A parameter without a gradient here may have one elsewhere.
            for parameter in bucket:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._send(bucket, [numbers] if bucket is self.buckets[-1] else [])
        self.own.wait([work for _, work in self._sent])
        for bucket, (flat, _) in zip(self.buckets, self._sent, strict=True):
            sizes = [parameter.numel() for parameter in bucket]
            *sums, rest = cast(list[Tensor], flat.split([*sizes, len(flat) - sum(sizes)]))
            for gradient, total in zip(_gradients(bucket), sums, strict=True):
                gradient.copy_(total.view_as(gradient))
        self._sent = []
        return rest

    def _arrived(self, number: int, parameter: Tensor) -> None:
        """Handle a gradient of bucket `number`; it is complete in the last backward pass of a step."""
        if not self._missing:
            return
        if number < len(self._sent):
            raise DatamergeError(
                "expected a backward pass that reaches each parameter once, found a parameter that it reaches twice; "
                "train in one process, or use an encoder that checkpoints with `use_reentrant=False`"
            )
        self._missing[number].discard(parameter)
        # The last bucket is sent by `finish`, together with its numbers.
        while len(self._sent) < len(self.buckets) - 1 and not self._missing[len(self._sent)]:
            self._send(self.buckets[len(self._sent)], [])

    def _send(self, bucket: Sequence[nn.Parameter], numbers: list[Tensor]) -> None:
        flat = torch.cat([*(gradient.reshape(-1) for gradient in _gradients(bucket)), *numbers])
        self._sent.append((flat, self.own.start_sum(flat)))


def _gradients(bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in bucket if parameter.grad is not None]


def _cut(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split parameters into buckets of at most `BUCKET_BYTES`, or one parameter; the last parameters come first."""
    buckets: list[list[nn.Parameter]] = [[]]
    room = BUCKET_BYTES
    for parameter in reversed(parameters):
        if buckets[-1] and parameter.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].insert(0, parameter)
        room -= parameter.nbytes
    return buckets
