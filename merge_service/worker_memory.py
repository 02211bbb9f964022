"""Peak memory of a worker, and how many workers a machine has room for.

    interpreter and libraries + weights + two shards + images · (tensors saved by autograd + copies of the pixels)

`images` is the number of images in a batch. The tensors that autograd saves are measured on one image. They are most
of the memory of large encoders: 244 MB an image in ViT-L/14, frozen weights or not, which is 16 GB for a batch of 64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.filesize import decimal as human_bytes

from datamerge.attacks import frozen
from datamerge.attacks.ball import forward
from datamerge.encoders import Encoder
from datamerge.runtime.memory import saved_for_backward
from merge_service.config import MergeConfig
from merge_service.sample_groups import READ_AT_ONCE
from storage_schemas import Layout

# A Ray worker with torch and a library of encoders imported, without weights.
LIBRARIES = 550 * 2**20
# float32 copies of a batch's pixels: bounds, points, gradients, for APGD also momentum and best points; and one of
# the previous batch, which is made into records meanwhile.
COPIES = {"pgd": 11, "apgd": 19, "none": 4}
# Bytes per pixel and restart of the random draws of this batch and the next.
DRAWS = 2 * 2
# Copies of the largest activation while its layer runs: input, output and their gradients.
LAYER = 4
# glibc returns freed blocks of this size to the system at once. Smaller ones fragment the heap: encoders took 1.2 (a
# ResNet) to 1.7 times (ViT-B/32) the bytes that autograd saved.
RETURNED_BYTES, FRAGMENTATION = 32 * 2**20, 1.7
# Share of the free memory to use: Ray kills workers when less than 5 % of a machine's memory is left.
USABLE = 0.9


@dataclass(frozen=True)
class WorkerMemory:
    """Peak memory of a worker, in parts.

    Attributes:
        fixed: bytes that do not depend on the batch.
        pixels: bytes of all float32 copies of one image.
        kept: bytes of each tensor that autograd saves for one image; empty without an attack.
        layer: bytes of the largest activation for one image.
        images: number of images in a batch.
        least: number of images in the smallest batch, one group.
    """

    fixed: int
    pixels: int
    kept: tuple[int, ...]
    layer: int
    images: int
    least: int

    @property
    def bytes(self) -> int:
        """Peak bytes of a worker."""
        return self.fixed + self.of_images(self.images)

    def of_images(self, number: int) -> int:
        """Bytes that depend on the batch, for a batch of `number` images."""
        pieces = [number * piece for piece in self.kept]
        kept = sum(piece * (1 if piece >= RETURNED_BYTES else FRAGMENTATION) for piece in pieces)
        return round(kept) + number * (LAYER * self.layer + self.pixels)

    def fitting(self, free: float, wanted: int) -> int:
        """How many of the wanted workers have room in `free` bytes; at least one."""
        return int(max(1, min(wanted, USABLE * free // self.bytes)))

    def shortage(self, free: float, wanted: int) -> str | None:
        """A line for the user if the wanted workers have no room in `free` bytes, with a remedy if any; else None."""
        if wanted * self.bytes <= USABLE * free:
            return None
        smaller = [2**power for power in range(20) if self.least <= 2**power < self.images]
        fits = [number for number in smaller if wanted * (self.fixed + self.of_images(number)) <= USABLE * free]
        fitting = self.fitting(free, wanted)
        found = f"{fitting} of {wanted} workers" if fitting < wanted else "not even one worker"
        remedy = f"; `batch_size={fits[-1]}` makes room for {wanted}" if fits else ""
        return (
            f"max_workers: memory has room for {found}: {human_bytes(round(free))} are free, and a worker takes "
            f"about {human_bytes(self.bytes)}{remedy}"
        )


def worker_memory(config: MergeConfig, layout: Layout, encoders: Sequence[Encoder], device: str) -> WorkerMemory:
    """Memory of the machine that a worker takes; with a GPU, images and activations are not in it.

    Args:
        config: settings of the merge.
        layout: layout of the artifact.
        encoders: encoders that the worker loads, on any device; the first is attacked, or embeds.
        device: device of the workers.
    """
    attacks, members = config.attacks, config.group_size or 1
    whole = config.grouping == "adversarial"  # a shard's images are read together
    values = math.prod(layout.pixels)
    # A record with its clean image, or with the sums (two int64 arrays) that it is made from.
    group = layout.bytes_per_record + values * (1 if whole else 16)
    per_batch = max(1, config.batch_size // members) * members if whole else min(config.batch_size, READ_AT_ONCE)
    draws = (DRAWS if config.grid else 2 * DRAWS) if attacks and config.random_start else 0
    on_cpu = bool(encoders) and not device.startswith("cuda")
    kept, copies = _kept(config, encoders[0]) if on_cpu else ((), 0)
    weights = sum(tensor.nbytes for one in encoders for tensor in (*one.parameters(), *one.buffers()))
    return WorkerMemory(
        fixed=LIBRARIES + weights + copies + 2 * layout.groups_per_shard * group,
        pixels=values * (4 * COPIES[config.attack] + draws * config.restarts) if on_cpu else 0,
        kept=kept if attacks else (),
        layer=max(kept, default=0),
        images=min(per_batch, layout.groups_per_shard * members) if whole else per_batch,
        least=members if whole else 1,
    )


def _kept(config: MergeConfig, encoder: Encoder) -> tuple[tuple[int, ...], int]:
    """Bytes of each tensor that autograd saves per image, and bytes that it saves whatever the batch.

    The latter are bfloat16 copies of weights.
    """

    def saved(images: int) -> list[int]:
        shape = (images, *encoder.input_shape)
        pixels = torch.full(shape, 0.5, device=encoder.mean.device, requires_grad=True)
        return saved_for_backward(encoder, lambda: forward(encoder, pixels, config.precision))[1]

    with frozen(encoder):
        one, two = saved(1), saved(2)
    more = [after - before for before, after in zip(one, two, strict=False)]
    return tuple(more), sum(one) - sum(more)
