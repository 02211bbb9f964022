"""Groups of adversarial images of one photo: attacked in batches that hold whole groups.

Shapes: G groups of a batch, N members, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks import (
    OBJECTIVES,
    Attacked,
    NonFiniteGradient,
    Precision,
    arithmetic,
    run_attack,
    sample_generators,
)
from datamerge.encoders import Encoder, Head
from datamerge.runtime.compilers import check_compiler
from merge_service.config import MergeConfig
from merge_service.grouping import Group
from merge_service.reading import Pixels
from storage_schemas import ExactMoments, Layout, Record, Reject, two_pass_moments
from storage_schemas.schema.factors import stored_factors
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Array, encode_exact

Batch = Sequence[tuple[Group, Pixels]]


class Attacker:
    """Makes records of clean images.

    Args:
        encoder: the attacked one, on its device.
        target_encoder: gives the embeddings that become targets; `encoder` itself unless the settings name another.
        head: class head, for objectives on labels.
    """

    def __init__(
        self, config: MergeConfig, layout: Layout, encoder: Encoder, target_encoder: Encoder, head: Head | None
    ) -> None:
        self._config = config
        self._layout = layout
        self._target_encoder = target_encoder
        self._device = encoder.mean.device
        self.model: nn.Module = encoder if head is None or _on_embeddings(config) else nn.Sequential(encoder, head)
        if config.compile:
            check_compiler("compile", self._device.type)
            self.model = torch.compile(self.model)  # type: ignore[assignment]
        self.precision: Precision = config.precision
        self.objective = config.objective

    def records(self, batch: Batch, rejects: list[Reject]) -> Iterator[Record]:
        """Attack G groups; those whose gradient is not finite are rejected, the others attacked again without."""
        members = self._config.group_size or 1
        while batch:
            try:
                yield from self._records(batch, members)
                return
            except NonFiniteGradient as error:
                bad = {index // members for index in error.indices}
                rejects += [
                    Reject(key=batch[i][0].key, sample=batch[i][0].samples[0].name, reason="non-finite gradient")
                    for i in sorted(bad)
                ]
                batch = [item for i, item in enumerate(batch) if i not in bad]

    def attack(self, batch: Batch, members: int) -> tuple[Attacked, Tensor]:
        """Attack G groups at once: the clean images are encoded once, their N members run together.

        Returns:
            The attack's result on [G·N, C, H, W], and the clean embeddings [G, K].
        """
        clean = torch.from_numpy(np.stack([image for _, image in batch])).to(self._device).float() / LEVELS
        with torch.no_grad(), arithmetic(self._device):
            embeddings = self._target_encoder(clean)
        target = self.targets(batch, embeddings)
        result = run_attack(
            self.model,
            clean.repeat_interleave(members, dim=0),
            target.repeat_interleave(members, dim=0),
            OBJECTIVES[self._config.objective],
            self._config.attack_settings,
            [g for group, _ in batch for g in sample_generators(self._config.seed, group.key, members)],
            [f"{group.samples[0].name} (member {i})" for group, _ in batch for i in range(members)],
            restarts=self._config.restarts,
            precision=self.precision,
        )
        return result, embeddings

    def targets(self, batch: Batch, embeddings: Tensor) -> Tensor:
        """The objective's second argument, a row a group: embeddings [G, K] or labels [G]."""
        if _on_embeddings(self._config):
            return embeddings
        return torch.tensor([group.label for group, _ in batch], device=self._device)

    def _records(self, batch: Batch, members: int) -> list[Record]:
        result, embeddings = self.attack(batch, members)
        pixels = result.pixels.cpu().unflatten(0, (len(batch), members))
        start = result.start_loss.view(-1, members).mean(dim=1).tolist()
        end = result.loss.view(-1, members).mean(dim=1).tolist()
        targets = embeddings.float().cpu().numpy()
        return [
            Record(
                key=group.key,
                count=members,
                encoding=self._layout.encoding,
                arrays=self._arrays(group.key, clean, pixels[i], targets[i]),
                label=group.label,
                samples=(group.samples[0].name,),
                info={"attack_loss_start": start[i], "attack_loss": end[i]},
            )
            for i, (group, clean) in enumerate(batch)
        ]

    def _arrays(self, key: str, clean: Pixels, pixels: Tensor, target: Array) -> dict[str, Array]:
        arrays: dict[str, Array]
        if self._config.grid:
            members = (pixels * LEVELS).round().to(torch.uint8).numpy()
            arrays = encode_exact(ExactMoments.of(members), self._layout)
            if self._config.keep_members:
                arrays["members"] = members
            if self._config.factors is not None:
                arrays["factors"] = stored_factors(
                    members, self._layout, self._config.factor_kind, self._config.seed, key
                )
        else:
            mean, mean_square = two_pass_moments(pixels.numpy())
            arrays = {"mean": mean.astype(np.float32), "mean_square": mean_square.astype(np.float32)}
        if self._config.keep_clean:
            arrays["clean"] = clean
        if self._config.stores_embedding:
            arrays["target"] = target
        return arrays


def _on_embeddings(config: MergeConfig) -> bool:
    return config.objective == "squared_error"
