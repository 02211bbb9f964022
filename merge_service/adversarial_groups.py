"""Groups of adversarial images of one photo, attacked in batches of whole groups.

A batch takes three steps. `inputs` runs on the CPU and `records` waits for the device, each in any thread; `run`
attacks, and only one thread at a time may call it.

Shapes: G groups of a batch, N members, C H W pixels, K embedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from datamerge.attacks import (
    OBJECTIVES,
    Attacked,
    NonFiniteGradient,
    Precision,
    arithmetic,
    draw_starts,
    quotient,
    run_attack,
    sample_generators,
)
from datamerge.encoders import Encoder, Head
from datamerge.runtime.compilers import prepare_compilation
from merge_service.config import MergeConfig
from merge_service.grouping import Group
from merge_service.reading import Pixels
from merge_service.stored_arrays import factor_array, grid_levels, moment_arrays, on_host
from storage_schemas import Layout, Record, Reject, two_pass_moments
from storage_schemas.schema.factors import sign_generator
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Array

Batch = Sequence[tuple[Group, Pixels]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs of an attack on a batch, in CPU memory; pinned if a GPU will copy them.

    Attributes:
        clean: clean images, uint8 [G, C, H, W].
        draws: random numbers of the starts, one tensor [G·N, C, H, W] per restart.
    """

    clean: Tensor
    draws: Sequence[Tensor]

    def of(self, groups: Sequence[int]) -> Inputs:
        """The inputs of some of the groups."""
        some = torch.tensor(groups, dtype=torch.int64)
        return Inputs(
            self.clean[some],
            [draws.unflatten(0, (len(self.clean), -1))[some].flatten(0, 1) for draws in self.draws],
        )


@dataclass(frozen=True, slots=True)
class AttackedBatch:
    """An attack whose kernels have all been launched; a GPU may still be running the last of them.

    Attributes:
        result: the attacked pixels [G·N, C, H, W] and their losses.
        embeddings: target embeddings of the clean images, [G, K].
        done: event after the last kernel; None on the CPU.
    """

    batch: Batch
    result: Attacked
    embeddings: Tensor
    done: torch.cuda.Event | None


class Attacker:
    """Attacks clean images and makes records of the members.

    Args:
        encoder: the encoder to attack, on its device.
        target_encoder: its embeddings become targets; the same as `encoder` unless the settings name another.
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
            prepare_compilation("compile", self._device.type)
            self.model = torch.compile(self.model)  # type: ignore[assignment]  # typed as a callable, it is a Module
        self.precision: Precision = config.precision
        self.objective = config.objective
        self._members = config.group_size or 1
        self.groups_per_batch = max(1, config.batch_size // self._members)
        # Records are made during the next attack; on its stream they would wait for its kernels.
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def inputs(self, batch: Batch) -> Inputs:
        """Clean images and random starts of G groups."""
        clean = stacked(batch, self._device)
        shape, pinned = tuple(clean.shape[1:]), self._device.type == "cuda"
        seed, members = self._config.seed, self._members
        generators = [one for group, _ in batch for one in sample_generators(seed, group.key, members)]
        settings, restarts = self._config.attack_settings, self._config.restarts
        return Inputs(clean, draw_starts(settings, shape, generators, restarts=restarts, pinned=pinned))

    def run(self, batch: Batch, inputs: Inputs, rejects: list[Reject]) -> AttackedBatch | None:
        """Attack G groups. Groups whose gradient is not finite are rejected, and the others attacked again.

        Returns:
            None if all were rejected.
        """
        while batch:
            try:
                result, embeddings = self.attack(batch, inputs)
            except NonFiniteGradient as error:
                bad = {index // self._members for index in error.indices}
                rejects += [
                    Reject(key=batch[i][0].key, sample=batch[i][0].samples[0].name, reason="non-finite gradient")
                    for i in sorted(bad)
                ]
                left = [i for i in range(len(batch)) if i not in bad]
                batch, inputs = [batch[i] for i in left], inputs.of(left)
            else:
                done = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
                return AttackedBatch(batch, result, embeddings, done)
        return None

    def attack(self, batch: Batch, inputs: Inputs) -> tuple[Attacked, Tensor]:
        """Attack G groups at once: each clean image is encoded once, and all members run in one batch.

        Returns:
            The attack's result on [G·N, C, H, W], and the embeddings of the clean images [G, K].
        """
        members = self._members
        clean = quotient(inputs.clean.to(self._device, non_blocking=True).float(), LEVELS)
        with torch.no_grad(), arithmetic(self._device):
            embeddings = self._target_encoder(clean)
        target = self.targets(batch, embeddings)
        result = run_attack(
            self.model,
            clean.repeat_interleave(members, dim=0),
            target.repeat_interleave(members, dim=0),
            OBJECTIVES[self._config.objective],
            self._config.attack_settings,
            (),
            [f"{group.samples[0].name} (member {i})" for group, _ in batch for i in range(members)],
            restarts=self._config.restarts,
            precision=self.precision,
            draws=inputs.draws,
        )
        return result, embeddings

    def targets(self, batch: Batch, embeddings: Tensor) -> Tensor:
        """The objective's targets, one per group: embeddings [G, K] or labels [G]."""
        if _on_embeddings(self._config):
            return embeddings
        return torch.tensor([group.label for group, _ in batch], device=self._device)

    def records(self, attacked: AttackedBatch) -> list[Record]:
        """The records of a batch, in the order of its groups; waits for the device."""
        batch, members = attacked.batch, self._members
        with self._beside(attacked.done):
            numbers = on_host(
                {
                    "start": attacked.result.start_loss.view(-1, members).mean(dim=1),
                    "end": attacked.result.loss.view(-1, members).mean(dim=1),
                    "targets": attacked.embeddings.float(),
                }
            )
            pixels = attacked.result.pixels.unflatten(0, (len(batch), members))
            # A GPU takes all groups at once; one group at a time fits a CPU's caches.
            some = len(batch) if self._stream is not None else 1
            arrays = [
                found
                for first in range(0, len(batch), some)
                for found in self._arrays(batch[first : first + some], pixels[first : first + some])
            ]
        start, end = numbers["start"].tolist(), numbers["end"].tolist()
        if self._config.keep_clean:
            for found, (_, clean) in zip(arrays, batch, strict=True):
                found["clean"] = clean
        if self._config.stores_embedding:
            for found, target in zip(arrays, numbers["targets"].numpy(), strict=True):
                found["target"] = target
        return [
            Record(
                key=group.key,
                count=members,
                encoding=self._layout.encoding,
                arrays=arrays[i],
                label=group.label,
                samples=(group.samples[0].name,),
                info={"attack_loss_start": start[i], "attack_loss": end[i]},
            )
            for i, (group, _) in enumerate(batch)
        ]

    def _arrays(self, batch: Batch, pixels: Tensor) -> list[dict[str, Array]]:
        """The stored arrays of each group, from the members [G, N, C, H, W]."""
        if not self._config.grid:
            moments = (two_pass_moments(group) for group in on_host({"pixels": pixels})["pixels"].numpy())
            return [
                {"mean": mean.astype(np.float32), "mean_square": square.astype(np.float32)}
                for mean, square in moments
            ]
        members = grid_levels(pixels)
        stored = moment_arrays(members, self._layout)
        if self._config.keep_members:
            stored["members"] = members
        spec = self._layout.array("factors")
        if spec is not None:
            generators = [sign_generator(self._config.seed, group.key) for group, _ in batch]
            found = factor_array(members, spec.shape[0], self._config.factor_kind, generators)
            stored["factors"] = found.to(getattr(torch, spec.dtype))
        arrays = {name: array.numpy() for name, array in on_host(stored).items()}
        return [{name: array[i] for name, array in arrays.items()} for i in range(len(batch))]

    @contextmanager
    def _beside(self, done: torch.cuda.Event | None) -> Iterator[None]:
        """On a GPU, run the block on a second stream: after `done`, but not after the attack launched since.

        `on_host` waits, so all kernels of the block have run when it ends, and their inputs may be freed.
        """
        if self._stream is None or done is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(done)
            yield


def stacked(batch: Batch, device: torch.device) -> Tensor:
    """The images of a batch, uint8 [G, C, H, W] in CPU memory; pinned if a GPU will copy them."""
    shape = (len(batch), *batch[0][1].shape)
    images = torch.empty(shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    np.stack([image for _, image in batch], out=images.numpy())
    return images


def _on_embeddings(config: MergeConfig) -> bool:
    return config.objective == "squared_error"
