"""The memory that a worker takes at most, and how many a machine has room for.

    interpreter and libraries + weights + two shards + images · (what autograd keeps of one + copies of its pixels)

`images` are those of a batch. What autograd keeps is measured on one image; it is most of the memory of large
encoders: 244 MB of an image in ViT-L/14, frozen weights or not, which is 16 GB for a batch of 64.
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

# A worker of Ray with torch and a library of encoders, without weights.
LIBRARIES = 550 * 2**20
# float32 copies of the pixels of a batch: bounds, points, gradients; APGD's momentum and best points too. One is that
# of the last batch, which becomes records meanwhile.
COPIES = {"pgd": 11, "apgd": 19, "none": 4}
# Bytes of a pixel's draw, for this batch and the next, each restart.
DRAWS = 2 * 2
# Of the largest activation, which a layer has as input, output and gradients while it runs.
LAYER = 4
# glibc gives freed pieces of this size back at once. Smaller ones leave holes: with these, encoders took 1.2 (a
# ResNet) to 1.7 times (ViT-B/32) the memory of what they kept.
GIVEN_BACK, HOLES = 32 * 2**20, 1.7
# Of the free memory: Ray kills workers where less than a twentieth of the machine's is left.
USABLE = 0.9


@dataclass(frozen=True)
class WorkerMemory:
    """What a worker takes.

    Attributes:
        fixed: bytes besides those of images.
        pixels: bytes of an image in float32, with its copies.
        kept: bytes of each piece that autograd keeps of one image; empty where nothing is attacked.
        layer: bytes of the largest activation of one image.
        images: in a batch.
        least: images in the smallest batch: those of one group.
    """

    fixed: int
    pixels: int
    kept: tuple[int, ...]
    layer: int
    images: int
    least: int

    @property
    def bytes(self) -> int:
        """Of a worker."""
        return self.fixed + self.of_images(self.images)

    def of_images(self, number: int) -> int:
        """Bytes of so many images at once."""
        pieces = [number * piece for piece in self.kept]
        kept = sum(piece * (1 if piece >= GIVEN_BACK else HOLES) for piece in pieces)
        return round(kept) + number * (LAYER * self.layer + self.pixels)

    def fitting(self, free: float, wanted: int) -> int:
        """How many of so many workers have room; one starts in any case."""
        return int(max(1, min(wanted, USABLE * free // self.bytes)))

    def shortage(self, free: float, wanted: int) -> str | None:
        """A line for the user where so many workers have no room, with a remedy if there is one; else None."""
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
    """What a worker of a merge takes of the machine's memory; on a GPU, images and their activations take none.

    Args:
        encoders: that it loads, on any device; the first one is attacked, or embeds.
        device: of the workers.
    """
    attacks, members = config.attacks, config.group_size or 1
    whole = config.grouping == "adversarial"  # images of a shard are read together
    values = math.prod(layout.pixels)
    # A record and its clean image, or the sums that it is made from.
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
    """Bytes of each piece that autograd keeps of one image, and bytes that it keeps whatever the images are.

    The latter are weights in bfloat16.
    """

    def saved(images: int) -> list[int]:
        shape = (images, *encoder.input_shape)
        pixels = torch.full(shape, 0.5, device=encoder.mean.device, requires_grad=True)
        return saved_for_backward(encoder, lambda: forward(encoder, pixels, config.precision))[1]

    with frozen(encoder):
        one, two = saved(1), saved(2)
    more = [after - before for before, after in zip(one, two, strict=False)]
    return tuple(more), sum(one) - sum(more)
