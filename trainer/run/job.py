"""Prepare a run: open artifacts, load the encoder, and check that they and the settings are compatible.

Nothing is written or trained here, so an impossible request fails before it costs time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from datamerge.encoders import (
    Encoder,
    Head,
    head_from_arrays,
    load_head,
    pick_device,
    weights_sha256,
)
from datamerge.encoders.classes import Classes
from datamerge.encoders.runs import resolve
from datamerge.runtime.messages import say, warn
from storage_schemas import Artifact, ConfigError
from storage_schemas.schema.run import TrainedArtifact
from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.data.batches import Batch
from trainer.data.blend import Blend
from trainer.data.caching import check_room, opened
from trainer.data.copied import copied_ahead
from trainer.data.order import Order, Partition, groups_taken
from trainer.data.stream import Collate, stream
from trainer.losses import Loss, LossName, loss_of
from trainer.run.agreement import check_all, of_artifact
from trainer.run.clean_images import clean_name
from trainer.run.distributed import Processes
from trainer.run.forward import Forward, check_rows_apart, freeze, train_mode
from trainer.run.identity import free_of_place
from trainer.run.recompute import recompute_activations
from trainer.run.refine import Refinement
from trainer.run.requirements import (
    Checked,
    check_apart,
    check_attacked,
    check_groups,
    check_held_out,
    check_recorded,
    label_names,
    matched_rows,
)
from trainer.weights import spelt

ARTIFACT_HEAD = "artifact"
# Data workers start for each evaluation; a single thread reads this many held-out groups in the same time.
WITHOUT_WORKERS = 10_000


Feed = Callable[[Partition, int, int], Iterator[Batch]]
"""(partition, first step, step after the last) → the micro-batches of those steps, as `Order.shares` lists them."""


@dataclass(frozen=True)
class Origin:
    """Origin of the groups, for the summary.

    Attributes:
        artifacts: the artifacts with their weights.
        sha256: hash that identifies the groups and weights.
        arm: the paper's name for the arm.
        bytes_per_group: mean uncompressed size of the arrays that are read of a group.
    """

    artifacts: tuple[TrainedArtifact, ...]
    sha256: str
    arm: str
    bytes_per_group: float

    @property
    def url(self) -> str:
        """All artifacts in one line."""
        return ", ".join(spelt(one.url, one.weight) for one in self.artifacts)


@dataclass(frozen=True)
class HeldOut:
    """Held-out groups.

    Attributes:
        order: their order.
        feed: reads them.
        measure: identifies groups and loss; held-out losses are comparable if their measures are equal.
    """

    order: Order
    feed: Feed
    measure: str


@dataclass(frozen=True)
class Job:
    """A run that can start.

    Attributes:
        config: the settings with every default resolved; `steps` is set and `epochs` is not.
        encoder: on its device, in training mode, with the starting weights.
        model: pixels → outputs: the encoder, followed by the frozen head if there is one.
        loss: loss of one image.
        order: groups of each step.
        feed: reads the groups.
        held_out: held-out groups; None without `eval_artifact`.
        origin: origin of the groups.
        device: device of the encoder.
        identity: settings and hashes that determine the result.
        refinement: PGD steps on stored images before each update; None without `refine_steps`.
    """

    config: TrainConfig
    encoder: Encoder
    model: Forward
    loss: Loss
    order: Order
    feed: Feed
    held_out: HeldOut | None
    origin: Origin
    device: torch.device
    identity: dict[str, Any]
    refinement: Refinement | None = None

    @property
    def steps(self) -> int:
        """Length of the run."""
        return cast(int, self.config.steps)


def make_job(config: TrainConfig, own: Processes | None = None) -> Job:
    """Open the artifact, load the encoder, and check that they and the settings are compatible.

    Args:
        config: settings.
        own: this process among those of the run; None for a single process.

    Raises:
        ConfigError: artifact, encoder and settings are incompatible.
        NotAnArtifact: there is no artifact at `config.artifact`.
    """
    own = own or Processes()
    device = _choose_device(config.device, own)
    blend = Blend([opened(one.url, config.cache, config.cache_bytes) for one in config.artifacts])
    artifact = blend.artifacts[0]
    found = check_all(config, blend.artifacts)
    order = _order(blend, config)
    steps = length(config, order, own)
    encoder = resolve(found.encoder, device=str(device), image_size=config.image_size).encoder
    first = of_artifact(config, 0)
    check_recorded(first, artifact.manifest, encoder)
    check_attacked(first, found, artifact.manifest, encoder)
    head = _head(first, artifact, device) if found.labels else None
    classes = _classes(first, artifact, encoder, head) if found.labels else None
    has_other_head = config.head not in (None, ARTIFACT_HEAD)
    collate = Collate(
        arm=config.arm,
        labels=found.labels,
        members=found.members,
        classes=classes.count if classes else None,
        clean=found.clean,
        rows=matched_rows(artifact, classes, "head") if classes and has_other_head else None,
    )
    for one in blend.artifacts:
        check_groups(one, encoder, collate)
    held_out = _held_out(config, blend, found, encoder, collate, device, classes)
    if encoder.random_weights:
        warn(f"encoder {encoder.spec} starts from random weights")
    resolved = _resolved(config, blend, found.loss, encoder, head, steps).model_copy(update={"device": str(device)})
    origin = _origin(resolved, blend, collate, found.title)
    return Job(
        config=resolved,
        encoder=encoder,
        model=ready(encoder, head, config, device),
        loss=loss_of(found.loss, config.loss_scale),
        order=order,
        feed=_feed(blend, order, collate, config.data_workers, device),
        held_out=held_out,
        origin=origin,
        device=device,
        identity={
            **free_of_place(resolved),
            "plan_sha256": origin.sha256,
            **({"weights": [one.weight for one in config.artifacts]} if len(blend.artifacts) > 1 else {}),
            **{f"encoder_{name}": value for name, value in encoder.identity.items()},
            "preprocessing": encoder.preprocessing.record(),
            "head_sha256": None if head is None else weights_sha256(head),
        },
        refinement=found.refinement,
    )


def ready(encoder: Encoder, head: Head | None, config: TrainConfig, device: torch.device) -> Forward:
    """Freeze layers, set training mode, check that rows are independent, and return the model to train.

    Raises:
        ConfigError: see `freeze`, `check_rows_apart`, `recompute_activations` and `compile_forward`.
    """
    freeze(encoder, config.freeze)
    train_mode(encoder)
    check_rows_apart(encoder, device)
    if config.grad_checkpointing:
        kept = recompute_activations(encoder, device)
        say(
            f"grad_checkpointing: activations of one image take {kept.after / 2**20:.1f} MB, "
            f"{kept.before / 2**20:.1f} MB without it"
        )
    return Forward(encoder, None if head is None else head.to(device), config.precision, config.compile)


def length(config: TrainConfig, order: Order, own: Processes) -> int:
    """Number of steps of the run.

    Raises:
        ConfigError: the warm-up is as long as the run, or a batch has fewer groups than micro-batches.
    """
    steps = config.steps or (config.epochs or 0) * order.steps_per_epoch
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"warmup_steps: expected fewer than the run's {steps} steps, found {config.warmup_steps}; "
            f"try `warmup_steps={steps // 10}`"
        )
    pieces = own.world * config.accumulate
    if config.batch_size < pieces:
        raise ConfigError(
            f"batch_size: expected at least {pieces} groups, one for each of {own.world} processes x "
            f"{config.accumulate} micro-batches, found {config.batch_size}; use `batch_size={pieces}`"
        )
    return steps


def _order(blend: Blend, config: TrainConfig, setting: str = "artifact") -> Order:
    weights = [(len(artifact.shard_sizes), 1.0) for artifact in blend.artifacts]
    if setting == "artifact":
        weights = [(shards, one.weight) for (shards, _), one in zip(weights, config.artifacts, strict=True)]
    for artifact, (_, weight) in zip(blend.artifacts, weights, strict=True):
        if not groups_taken(len(artifact), weight):
            few = f" of {len(artifact)} with a weight of {weight:g}" if len(artifact) else ""
            raise ConfigError(f"{setting}: expected groups to train on, found none{few} in {artifact.location.url}")
    window = None if config.shuffle_window == "all" else config.shuffle_window
    return Order(blend.shard_sizes, config.batch_size, config.seed, window, weights)


def _feed(blend: Blend, order: Order, collate: Collate, workers: int, device: torch.device) -> Feed:
    check_room(blend.only(collate.arrays()))
    pin = device.type == "cuda"

    def feed(partition: Partition, start: int, stop: int) -> Iterator[Batch]:
        batches = stream(blend, order, collate, start=start, stop=stop, workers=workers, pin=pin, partition=partition)
        return copied_ahead(batches, device) if device.type == "cuda" else batches

    return feed


def _held_out(
    config: TrainConfig,
    trained: Blend,
    found: Checked,
    encoder: Encoder,
    collate: Collate,
    device: torch.device,
    classes: Classes | None,
) -> HeldOut | None:
    """Open the held-out artifact, with the checks of the training artifact."""
    if config.eval_artifact is None:
        return None
    other = config.model_copy(update={"artifact": config.eval_artifact})
    artifact = opened(config.eval_artifact, config.cache, config.cache_bytes)
    for number, own in enumerate(trained.artifacts):
        check_apart(of_artifact(config, number), own.manifest, artifact.manifest)
    members = check_held_out(other, found, artifact.manifest)
    rows = matched_rows(artifact, classes, "eval_artifact") if classes else None
    clean = clean_name(artifact.manifest) if found.clean else None
    collate = dataclasses.replace(collate, members=members, rows=rows, clean=clean)
    check_groups(artifact, encoder, collate)
    blend = Blend.of(artifact)
    order = _order(blend, other, "eval_artifact")
    workers = config.data_workers if order.groups > WITHOUT_WORKERS else 0
    feed = _feed(blend, order, collate, workers, device)
    measure = artifact.manifest.plan_sha256
    if ARMS[config.arm].estimators or config.refine_steps:
        # Releases before 0.2.0 measured another loss than the training loss for these, and recorded only the hash.
        measure += ", trained loss"
    return HeldOut(order, feed, measure)


def _origin(config: TrainConfig, blend: Blend, collate: Collate, title: str) -> Origin:
    artifacts, bytes_read, wanted = [], [], collate.arrays()
    for one, artifact in zip(config.artifacts, blend.artifacts, strict=True):
        manifest = artifact.manifest
        artifacts.append(
            TrainedArtifact(url=one.url, plan_sha256=manifest.plan_sha256, weight=one.weight, groups=len(artifact))
        )
        bytes_read.append(sum(spec.nbytes for spec in manifest.layout.arrays if spec.name in wanted))
    groups = [groups_taken(one.groups, one.weight) for one in artifacts]
    return Origin(
        artifacts=tuple(artifacts),
        sha256=_identity(artifacts),
        arm=title,
        bytes_per_group=sum(map(operator.mul, groups, bytes_read)) / sum(groups),
    )


def _identity(artifacts: Sequence[TrainedArtifact]) -> str:
    """The hash of a single artifact of weight 1, or a hash over all artifacts and weights, in their order."""
    if len(artifacts) == 1 and artifacts[0].weight == 1:
        return artifacts[0].plan_sha256
    parts = [[one.plan_sha256, one.weight] for one in artifacts]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _resolved(
    config: TrainConfig, blend: Blend, loss: LossName, encoder: Encoder, head: Head | None, steps: int
) -> TrainConfig:
    """The settings with their defaults resolved."""
    locations = [artifact.location for artifact in blend.artifacts]
    places = [location.root if location.is_local else location.url for location in locations]
    texts = [spelt(place, one.weight) for place, one in zip(places, config.artifacts, strict=True)]
    return config.model_copy(
        update={
            "artifact": texts[0] if len(texts) == 1 else texts,
            "loss": loss,
            "encoder": encoder.spec,
            "image_size": None,  # part of the resolved spec
            "head": None if head is None else config.head or ARTIFACT_HEAD,
            "steps": steps,
            "epochs": None,
        }
    )


def _choose_device(name: str, own: Processes) -> torch.device:
    """The torch device of the setting; each of several processes takes its own GPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if own.world > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
        return own.take_gpu()
    return pick_device(name)


def _classes(config: TrainConfig, artifact: Artifact, encoder: Encoder, head: Head | None) -> Classes:
    """The classes in training: rows of the head, or outputs of an encoder without one."""
    if head is None:
        return Classes(label_names(artifact), encoder.embedding_dim, f"the outputs of {encoder.spec}")
    head.check_width(encoder.embedding_dim)
    own = config.head in (None, ARTIFACT_HEAD)
    names = head.names or (label_names(artifact) if own else ())
    return Classes(names, len(head.weight), f"the head of {config.artifact}" if own else f"head {config.head!r}")


def _head(config: TrainConfig, artifact: Artifact, device: torch.device) -> Head | None:
    """The frozen class head; None if the encoder's outputs are the logits."""
    stored = artifact.head()
    if config.head is not None and config.head != ARTIFACT_HEAD:
        return load_head(config.head, label_names(artifact), device=str(device))
    if stored is None and config.head is not None:
        raise ConfigError(f"head: found none in {config.artifact}; name a file or spec in `head`")
    return None if stored is None else head_from_arrays(*stored)
