"""Gradients summed over the processes, in buckets that are sent while the backward pass still runs.

Parameters are cut into buckets from the last one to the first, which is about the order in which a backward pass
comes to them. In the last backward pass of a step each bucket is sent as soon as it and all before it are complete;
what is left then is sent with the numbers that all processes must agree on. So every process sends the same buckets
in the same order, whatever it computes and whenever: one without groups sends them all at the end. How sums are
rounded depends on the cut, which depends on the parameters alone.
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

BUCKET_BYTES = 25 * 2**20  # as DistributedDataParallel's: large enough for a network's rate, small against an encoder


class Exchange:
    """The sums of a step over all processes.

    Attributes:
        own: this process among those of the run.
        parameters: whose gradients are summed.
        buckets: the same, in the order in which they are sent.
    """

    def __init__(self, own: Processes, parameters: Sequence[nn.Parameter]) -> None:
        self.own, self.parameters = own, parameters
        self.buckets = _cut(parameters)
        self._sent: list[tuple[Tensor, Work]] = []
        # For each bucket, parameters whose gradient is still to come; empty while nothing is sent.
        self._missing: list[set[Tensor]] = []
        if own.world == 1:
            return
        # Called where `.grad` has been added to, so never by `torch.autograd.grad`, of which estimators make use.
        for number, bucket in enumerate(self.buckets):
            for parameter in bucket:
                parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))

    @contextmanager
    def sending(self, last: bool) -> Iterator[None]:
        """Send buckets as they are completed by the backward pass inside.

        If that breaks off and is repeated outside, what was sent is as good as what the repetition finds.

        Args:
            last: whether the gradients of the step are complete after it; otherwise nothing is sent.

        Raises:
            DatamergeError: a gradient was added to after it was sent.
        """
        if last and self.own.world > 1:
            self._missing = [set(bucket) for bucket in self.buckets]
        try:
            yield
        finally:
            self._missing = []

    def finish(self, numbers: Tensor) -> Tensor:
        """Send what was not sent, and replace all gradients by their sums.

        Args:
            numbers: a vector of further numbers to be summed, on the same device.

        Returns:
            The sums of `numbers` and, of several processes, for each parameter in how many it had a gradient.

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
        """A gradient of bucket `number` is complete, unless it comes from a backward pass before the last."""
        if not self._missing:
            return
        if number < len(self._sent):
            raise DatamergeError(
                "expected a backward pass to come to each parameter once, found one that it came to again; train in "
                "one process, or use an encoder that checkpoints with `use_reentrant=False`"
            )
        self._missing[number].discard(parameter)
        # The last bucket waits for the numbers.
        while len(self._sent) < len(self.buckets) - 1 and not self._missing[len(self._sent)]:
            self._send(self.buckets[len(self._sent)], [])

    def _send(self, bucket: Sequence[nn.Parameter], numbers: list[Tensor]) -> None:
        flat = torch.cat([*(gradient.reshape(-1) for gradient in _gradients(bucket)), *numbers])
        self._sent.append((flat, self.own.start_sum(flat)))


def _gradients(bucket: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in bucket if parameter.grad is not None]


def _cut(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in buckets of at most `BUCKET_BYTES`, or of one; the last ones first, each in the order given."""
    buckets: list[list[nn.Parameter]] = [[]]
    room = BUCKET_BYTES
    for parameter in reversed(parameters):
        if buckets[-1] and parameter.nbytes > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].insert(0, parameter)
        room -= parameter.nbytes
    return buckets
