"""One shard, from raw images to its commit: a plain object without Ray, so that it can be called from anywhere.

Shapes: G groups of a batch, N members, C H W pixels, K embedding.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from adversarial import (
    OBJECTIVES,
    Attacked,
    Encoder,
    Head,
    NonFiniteGradient,
    attack,
    load_encoder,
    sample_generators,
)
from merge_service.config import MergeConfig
from merge_service.planning import Group, ShardTask
from sources import BadImage, Reader, Sample, decode
from storage_schemas import ArtifactWriter, Commit, ConfigError, ExactMoments, Record, Reject, two_pass_moments
from storage_schemas.moments import LEVELS
from storage_schemas.record import Array, encode_exact

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to start; sent once."""

    config: MergeConfig
    writer: ArtifactWriter
    reader: Reader
    shape: tuple[int, int, int]
    encoder_sha256: str | None
    head: Head | None
    device: str


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What came of one shard."""

    shard: int
    groups: int
    rejects: tuple[Reject, ...]
    attack_seconds: float
    seconds: float


class ShardWorker:
    """Merges shards, one after the other, with one encoder in memory."""

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup = setup
        self._config = setup.config
        self._encoder = _load(setup)
        self._attack_seconds = 0.0

    def run(self, task: ShardTask) -> ShardResult:
        """Merge one shard and commit it."""
        started, self._attack_seconds = time.monotonic(), 0.0
        rejects: list[Reject] = []
        make = self._adversarial if self._config.grouping == "adversarial" else self._by_label
        records = list(make(task.groups, rejects))
        commit: Commit = self._setup.writer.commit(task.shard, records, rejects)
        return ShardResult(
            shard=task.shard,
            groups=len(commit.records),
            rejects=commit.rejects,
            attack_seconds=self._attack_seconds,
            seconds=time.monotonic() - started,
        )

    def _read(self, group: Group, sample: Sample, rejects: list[Reject]) -> Pixels | None:
        try:
            return decode(self._setup.reader.read(sample), self._setup.shape)
        except (BadImage, OSError) as error:
            rejects.append(Reject(key=group.key, sample=sample.name, reason=str(error)))
            return None

    def _by_label(self, groups: Sequence[Group], rejects: list[Reject]) -> Iterator[Record]:
        """Groups of given samples: read one by one, added up, forgotten."""
        for group in groups:
            kept: list[Pixels] = []
            used: list[str] = []

            def pixels(group: Group = group, kept: list[Pixels] = kept, used: list[str] = used) -> Iterator[Pixels]:
                for sample in group.samples:
                    image = self._read(group, sample, rejects)
                    if image is not None:
                        used.append(sample.name)
                        if self._config.keep_members:
                            kept.append(image)
                        yield image

            try:
                moments = ExactMoments.of(pixels())
            except ValueError:
                continue  # no sample could be read: every one of them is in the rejects
            arrays = encode_exact(moments, self._setup.writer.layout)
            if self._config.keep_members:
                arrays["members"] = self._padded(np.stack(kept))
            yield Record(
                key=group.key,
                count=moments.count,
                encoding=self._setup.writer.layout.encoding,
                arrays=arrays,
                label=group.label,
                samples=tuple(used),
            )

    def _adversarial(self, groups: Sequence[Group], rejects: list[Reject]) -> Iterator[Record]:
        """Groups of adversarial images of one photo, attacked in batches that hold whole groups."""
        members = self._config.group_size or 1
        per_batch = max(1, self._config.batch_size // members)
        for start in range(0, len(groups), per_batch):
            batch = [
                (group, image)
                for group in groups[start : start + per_batch]
                if (image := self._read(group, group.samples[0], rejects)) is not None
            ]
            while batch:
                try:
                    yield from self._attack(batch, members)
                    break
                except NonFiniteGradient as error:
                    # Without the bad ones the rest of the batch is fine.
                    bad = {index // members for index in error.indices}
                    rejects += [
                        Reject(key=batch[i][0].key, sample=batch[i][0].samples[0].name, reason="non-finite gradient")
                        for i in sorted(bad)
                    ]
                    batch = [item for i, item in enumerate(batch) if i not in bad]

    def _attack(self, batch: Sequence[tuple[Group, Pixels]], members: int) -> list[Record]:
        """Attack G groups at once: the clean images are encoded once, their N members run together."""
        encoder = self._encoder
        if encoder is None:
            raise ConfigError("adversarial groups need an encoder")
        started = time.monotonic()
        device = self._setup.device
        clean8 = np.stack([image for _, image in batch])
        clean = torch.from_numpy(clean8).to(device).float() / LEVELS
        with torch.no_grad():
            embeddings = encoder(clean)
        model, target = self._model_and_target(encoder, embeddings, [group for group, _ in batch])
        generators = [g for group, _ in batch for g in sample_generators(self._config.seed, group.key, members)]
        result = attack(
            model,
            clean.repeat_interleave(members, dim=0),
            target.repeat_interleave(members, dim=0),
            OBJECTIVES[self._config.objective],
            self._config.pgd,
            generators,
            [f"{group.samples[0].name} (member {i})" for group, _ in batch for i in range(members)],
        )
        pixels = result.pixels.cpu().unflatten(0, (len(batch), members))
        self._attack_seconds += time.monotonic() - started
        losses = _group_losses(result, members)
        return [
            self._record(group, clean8[i], pixels[i], embeddings[i].cpu(), losses[i])
            for i, (group, _) in enumerate(batch)
        ]

    def _model_and_target(
        self, encoder: Encoder, embeddings: Tensor, groups: Sequence[Group]
    ) -> tuple[nn.Module, Tensor]:
        if self._config.objective == "squared_error":
            return encoder, embeddings
        labels = torch.tensor([group.label for group in groups], device=embeddings.device)
        head = self._setup.head
        return (encoder if head is None else nn.Sequential(encoder, head)), labels

    def _record(
        self, group: Group, clean: Pixels, pixels: Tensor, embedding: Tensor, losses: dict[str, float]
    ) -> Record:
        layout = self._setup.writer.layout
        arrays: dict[str, Array]
        if self._config.grid:
            members = (pixels * LEVELS).round().to(torch.uint8).numpy()
            arrays = encode_exact(ExactMoments.of(members), layout)
            if self._config.keep_members:
                arrays["members"] = members
        else:
            mean, mean_square = two_pass_moments(pixels.numpy())
            arrays = {"mean": mean.astype(np.float32), "mean_square": mean_square.astype(np.float32)}
        if self._config.keep_clean:
            arrays["clean"] = clean
        arrays["target"] = embedding.float().numpy()
        return Record(
            key=group.key,
            count=len(pixels),
            encoding=layout.encoding,
            arrays=arrays,
            label=group.label,
            samples=(group.samples[0].name,),
            info=losses,
        )

    def _padded(self, members: Pixels) -> Pixels:
        """Members of a smaller group, filled up with zeros to the stored shape."""
        spec = self._setup.writer.layout.array("members")
        missing = (spec.shape[0] if spec else 0) - len(members)
        return np.pad(members, ((0, missing), (0, 0), (0, 0), (0, 0)))


def _group_losses(result: Attacked, members: int) -> list[dict[str, float]]:
    """Mean objective of each group's members, at the start and at the end of the attack."""
    start = result.start_loss.view(-1, members).mean(dim=1).tolist()
    end = result.loss.view(-1, members).mean(dim=1).tolist()
    return [{"attack_loss_start": a, "attack_loss": b} for a, b in zip(start, end, strict=True)]


def _load(setup: WorkerSetup) -> Encoder | None:
    """The encoder, with the threads its rounding depends on, and the weights the plan was made with."""
    torch.set_num_threads(setup.config.threads)
    if setup.config.encoder is None or setup.config.grouping != "adversarial":
        return None
    encoder = load_encoder(setup.config.encoder, setup.device)
    if encoder.sha256 != setup.encoder_sha256:
        raise ConfigError(
            f"encoder {setup.config.encoder!r}: the weights on this worker have sha256 {encoder.sha256[:12]}…, "
            f"expected {str(setup.encoder_sha256)[:12]}…; every node needs the same weights"
        )
    if setup.head is not None:
        setup.head.to(setup.device)
    return encoder
