"""Groups of one clean image each, without an attack: the image is the mean, and its embedding the target.

Every image goes through the encoder once, in batches; for label targets no encoder runs.

Shapes: G groups of a batch, C H W pixels, K embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from datamerge.attacks import arithmetic, quotient
from datamerge.encoders import Encoder
from merge_service.adversarial_groups import Batch, stacked
from merge_service.config import MergeConfig
from merge_service.stored_arrays import image_arrays, on_host
from storage_schemas import Layout, Record, Reject
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Array


@dataclass(frozen=True, slots=True)
class Embedded:
    """A batch and its embeddings, float32 [G, K] on the CPU; None for label targets."""

    batch: Batch
    embeddings: Tensor | None


class CleanImages:
    """Makes records of clean images.

    Args:
        encoder: encoder of the targets, on its device; None for label targets.
    """

    def __init__(self, config: MergeConfig, layout: Layout, encoder: Encoder | None) -> None:
        self._layout = layout
        self._encoder = encoder if config.stores_embedding else None
        self.groups_per_batch = config.batch_size

    def inputs(self, batch: Batch) -> Tensor | None:
        """The images, uint8 [G, C, H, W] in CPU memory; None without an encoder."""
        return None if self._encoder is None else stacked(batch, self._encoder.mean.device)

    def run(self, batch: Batch, inputs: Tensor | None, rejects: list[Reject]) -> Embedded | None:
        """Embed G images. Images whose embedding is not finite are rejected.

        Returns:
            None if all were rejected.
        """
        if self._encoder is None or inputs is None:
            return Embedded(batch, None)
        device = self._encoder.mean.device
        with torch.no_grad(), arithmetic(device):
            pixels = quotient(inputs.to(device, non_blocking=True).float(), LEVELS)
            embeddings = on_host({"target": self._encoder(pixels).float()})["target"]
        finite = embeddings.isfinite().all(dim=1)
        if not finite.all():
            rejects += [
                Reject(key=group.key, sample=group.samples[0].name, reason="non-finite embedding")
                for (group, _), fine in zip(batch, finite.tolist(), strict=True)
                if not fine
            ]
            batch = [one for one, fine in zip(batch, finite.tolist(), strict=True) if fine]
            embeddings = embeddings[finite]
        return Embedded(batch, embeddings) if batch else None

    def records(self, embedded: Embedded) -> list[Record]:
        """The records of a batch, in the order of its groups."""
        arrays: list[dict[str, Array]] = [image_arrays(image, self._layout) for _, image in embedded.batch]
        if embedded.embeddings is not None:
            for found, target in zip(arrays, embedded.embeddings.numpy(), strict=True):
                found["target"] = target
        return [
            Record(
                key=group.key,
                count=1,
                encoding=self._layout.encoding,
                arrays=found,
                label=group.label,
                samples=(group.samples[0].name,),
            )
            for (group, _), found in zip(embedded.batch, arrays, strict=True)
        ]
