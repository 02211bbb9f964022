"""From settings to everything a run needs; artifact, encoder and settings that do not fit are refused by name.

Nothing is written here and nothing is trained; a request that cannot work fails before it costs time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch

from adversarial import Encoder, Head, head_from_arrays, load_encoder, load_head, weights_sha256
from storage_schemas import Artifact, ConfigError, DatamergeError, Manifest, open_artifact
from trainer.config import TrainConfig
from trainer.distributed import Processes
from trainer.forward import Forward, check_rows_apart, freeze, train_mode
from trainer.logs import warn
from trainer.losses import CrossEntropy, Loss, SquaredError
from trainer.order import Layout, Order
from trainer.stream import Batch, Collate, check_label, stream

# Settings that say where and how fast, not what comes out; they may differ when a run is continued.
_FREE = {
    "artifact",
    "run",
    "epochs",
    "accumulate",
    "compile",
    "eval_artifact",
    "eval_every",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "data_workers",
    "threads",
    "log_every",
}
# Shards whose labels are checked before anything starts; those of the others are checked as they are read.
EAGER_SHARDS = 64
ARTIFACT_HEAD = "artifact"


Feed = Callable[[Layout, int, int], Iterator[Batch]]
"""(layout, first step, step after the last) → the micro-batches of those steps, as `Order.shares` lists them."""


@dataclass(frozen=True)
class Origin:
    """Where the groups come from, for the summary.

    Attributes:
        url: of the artifact.
        sha256: identity of what is there.
        arm: in the words of the paper.
        bytes_per_group: uncompressed, of the arrays that are read.
    """

    url: str
    sha256: str
    arm: str
    bytes_per_group: int


@dataclass(frozen=True)
class HeldOut:
    """Groups that are not trained on."""

    order: Order
    feed: Feed


@dataclass(frozen=True)
class Job:
    """A run that can start.

    Attributes:
        config: the settings with every default resolved; `steps` is set and `epochs` is not.
        encoder: on its device, in training mode, with the weights the run starts from.
        model: pixels → outputs: the encoder, followed by the frozen head if there is one.
        loss: loss of one image.
        order: which groups form which step.
        feed: reads them.
        held_out: other groups to measure on, if any.
        origin: where the groups come from.
        device: where the encoder is.
        identity: settings and hashes that determine the result.
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

    @property
    def steps(self) -> int:
        """Length of the run."""
        return cast(int, self.config.steps)


def make_job(config: TrainConfig, own: Processes | None = None) -> Job:
    """Open the artifact, load the encoder and check that they go together.

    Args:
        config: settings.
        own: this process among those of the run; one alone if not given.

    Raises:
        ConfigError: they do not, or not with these settings.
        NotAnArtifact: nothing to train on at `config.artifact`.
    """
    own = own or Processes()
    device = choose_device(config.device, own)
    artifact = open_artifact(config.artifact)
    loss_name = _loss_name(config, artifact.manifest)
    members = _members(config, artifact.manifest)
    _check_epsilon(config, artifact.manifest)
    spec = config.encoder or _recorded(artifact.manifest).get("spec")
    if not isinstance(spec, str):
        raise ConfigError(f"{config.artifact} names no encoder; add --encoder SPEC")
    order = _order(artifact, config)
    steps = length(config, order, own)
    encoder = load_encoder(spec, str(device))
    head = _head(config, artifact, loss_name)
    classes = None
    if loss_name == "cross_entropy":
        if head is not None:
            head.check_width(encoder.embedding_dim, "head")
        classes = encoder.embedding_dim if head is None else len(head.weight)
    collate = Collate(arm=config.arm, labels=loss_name == "cross_entropy", members=members, classes=classes)
    _check_groups(artifact, encoder, collate)
    warn_of_start(encoder)
    resolved = _resolved(config, artifact, loss_name, encoder, head, steps).model_copy(update={"device": str(device)})
    pin = device.type == "cuda"
    return Job(
        config=resolved,
        encoder=encoder,
        model=ready(encoder, head, config, device),
        loss=SquaredError(config.loss_scale) if loss_name == "squared_error" else CrossEntropy(),
        order=order,
        feed=_feed(artifact, order, collate, config.data_workers, pin),
        held_out=_held_out(config, encoder, collate, pin),
        origin=_origin(resolved, artifact, collate),
        device=device,
        identity={
            **free_of_place(resolved),
            "plan_sha256": artifact.manifest.plan_sha256,
            "encoder_sha256": encoder.sha256,
            "head_sha256": None if head is None else weights_sha256(head),
        },
    )


def ready(encoder: Encoder, head: Head | None, config: TrainConfig, device: torch.device) -> Forward:
    """The encoder as it is trained: layers frozen, in training mode, checked for mixing rows."""
    freeze(encoder, config.freeze)
    train_mode(encoder)
    check_rows_apart(encoder, device)
    return Forward(encoder, None if head is None else head.to(device), config.precision, config.compile)


def free_of_place(config: TrainConfig) -> dict[str, Any]:
    """The settings that determine the result."""
    return {name: value for name, value in config.model_dump(mode="json").items() if name not in _FREE}


def warn_of_start(encoder: Encoder) -> None:
    """Say so if there is nothing to fine-tune."""
    if encoder.random_weights:
        warn(f"encoder {encoder.spec} starts from random weights; nobody has trained it")


def length(config: TrainConfig, order: Order, own: Processes) -> int:
    """Steps of the run.

    Raises:
        ConfigError: a warm-up as long as the run, or batches that cannot be cut as asked.
    """
    steps = config.steps or (config.epochs or 0) * order.steps_per_epoch
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"warmup_steps: expected fewer than the run's {steps} steps, found {config.warmup_steps}; "
            f"add --warmup {steps // 10}"
        )
    pieces = own.world * config.accumulate
    if config.batch_size < pieces:
        raise ConfigError(
            f"batch_size: expected at least {pieces} groups, one for each of {own.world} processes x "
            f"{config.accumulate} micro-batches, found {config.batch_size}; add --batch-size {pieces}"
        )
    return steps


def _order(artifact: Artifact, config: TrainConfig) -> Order:
    if not len(artifact):
        raise ConfigError(f"{artifact.location.url}: expected groups to train on, found none")
    return Order(artifact.shard_sizes, config.batch_size, config.seed)


def _feed(artifact: Artifact, order: Order, collate: Collate, workers: int, pin: bool) -> Feed:
    def feed(layout: Layout, start: int, stop: int) -> Iterator[Batch]:
        return stream(artifact, order, collate, start=start, stop=stop, workers=workers, pin=pin, layout=layout)

    return feed


def _held_out(config: TrainConfig, encoder: Encoder, collate: Collate, pin: bool) -> HeldOut | None:
    """The held-out artifact, checked as the one that is trained on."""
    if config.eval_artifact is None:
        return None
    other = config.model_copy(update={"artifact": config.eval_artifact})
    artifact = open_artifact(config.eval_artifact)
    _loss_name(
        other.model_copy(update={"loss": "cross_entropy" if collate.labels else "squared_error"}), artifact.manifest
    )
    collate = dataclasses.replace(collate, members=_members(other, artifact.manifest))
    _check_groups(artifact, encoder, collate)
    order = _order(artifact, other)
    return HeldOut(order, _feed(artifact, order, collate, config.data_workers, pin))


def _origin(config: TrainConfig, artifact: Artifact, collate: Collate) -> Origin:
    wanted = collate.arrays()
    return Origin(
        url=config.artifact,
        sha256=artifact.manifest.plan_sha256,
        arm=_arm_name(config, artifact.manifest, collate),
        bytes_per_group=sum(spec.nbytes for spec in artifact.manifest.layout.arrays if spec.name in wanted),
    )


def _arm_name(config: TrainConfig, manifest: Manifest, collate: Collate) -> str:
    """The arm as the paper writes it: AT-N-Avg, AT-N-Ind; AT-N-Mean without the correction, AT-N-Random for one
    member a step of N."""
    grouping = manifest.provenance.get("grouping")
    size = grouping.get("members") if isinstance(grouping, dict) else None
    count = collate.members or size
    kind = {"avg": "Avg", "ind": "Ind", "mean-only": "Mean", "random-member": "Random"}[config.arm]
    return f"AT-{count}-{kind}" if count else f"AT-{kind}"


def _resolved(
    config: TrainConfig, artifact: Artifact, loss: str, encoder: Encoder, head: Head | None, steps: int
) -> TrainConfig:
    """The settings with what the defaults turned out to mean."""
    return config.model_copy(
        update={
            "artifact": artifact.location.root if artifact.location.is_local else artifact.location.url,
            "loss": loss,
            "encoder": encoder.spec,
            "head": None if head is None else config.head or ARTIFACT_HEAD,
            "steps": steps,
            "epochs": None,
        }
    )


def choose_device(name: str, own: Processes) -> torch.device:
    """The torch device of a setting; of several processes on one machine each takes a GPU of its own.

    Raises:
        ConfigError: no such device here.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        if own.world == 1:
            return torch.device("cuda")
        if own.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"device: expected a GPU for each process, found {torch.cuda.device_count()} on this machine; "
                "start at most as many processes there"
            )
        torch.cuda.set_device(own.local_rank)
        return torch.device("cuda", own.local_rank)
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device: {name!r} cannot be used here ({reason}); try --device cpu") from None
    return device


def _recorded(manifest: Manifest) -> dict[str, Any]:
    """What the artifact says of the encoder its targets come from."""
    encoder = manifest.provenance.get("encoder")
    return encoder if isinstance(encoder, dict) else {}


def _loss_name(config: TrainConfig, manifest: Manifest) -> str:
    has_targets = manifest.layout.array("target") is not None
    name = config.loss if config.loss != "auto" else ("squared_error" if has_targets else "cross_entropy")
    if name == "squared_error" and not has_targets:
        raise ConfigError(
            f"loss: squared_error expects stored target embeddings, found none in {config.artifact}; "
            "use --loss cross_entropy for an artifact with labels"
        )
    if name == "squared_error" and config.head is not None:
        raise ConfigError("head: squared_error trains on embeddings and takes no head; drop --head")
    if name == "cross_entropy" and config.loss_scale != 1.0:
        raise ConfigError(
            f"loss_scale: only the squared error is scaled, found {config.loss_scale} with cross_entropy; drop it"
        )
    return name


def _members(config: TrainConfig, manifest: Manifest) -> int:
    """Stored members to read of each group."""
    if config.arm not in ("ind", "random-member"):
        return 0
    stored = manifest.layout.array("members")
    if stored is None:
        raise ConfigError(
            f"arm: {config.arm} expects stored members, found none in {config.artifact}; merge again with "
            "--keep-members, or use --arm avg"
        )
    if config.members is not None and config.members > stored.shape[0]:
        raise ConfigError(
            f"members: expected at most the {stored.shape[0]} stored in {config.artifact}, found {config.members}"
        )
    return config.members or stored.shape[0]


def _check_epsilon(config: TrainConfig, manifest: Manifest) -> None:
    attack = manifest.provenance.get("attack")
    found = attack.get("epsilon") if isinstance(attack, dict) else None
    if config.epsilon is not None and (found is None or Fraction(str(found)) != Fraction(config.epsilon)):
        raise ConfigError(
            f"epsilon: expected an artifact attacked within {config.epsilon}, found {found or 'no attack'} in "
            f"{config.artifact}; choose another artifact or preset"
        )


def _check_groups(artifact: Artifact, encoder: Encoder, collate: Collate) -> None:
    """Whether these groups go through that encoder."""
    _check_pixels(encoder, artifact.location.url, artifact.manifest)
    if not collate.labels:
        _check_targets(encoder, artifact.location.url, artifact.manifest)
        return
    for position in range(min(len(artifact.shard_sizes), EAGER_SHARDS)):
        for entry in artifact.commit(position).records:
            check_label(entry.key, entry.label, collate.classes)


def _check_pixels(encoder: Encoder, where: str, manifest: Manifest) -> None:
    moments = manifest.layout.array("sum") or manifest.layout.array("mean")
    if moments is None:
        raise DatamergeError(f"{where}: its manifest lists neither sum nor mean; the artifact is not usable")
    if moments.shape != tuple(encoder.input_shape):
        raise ConfigError(
            f"encoder {encoder.spec!r} takes pixels {tuple(encoder.input_shape)}, found {moments.shape} in "
            f"{where}; choose another --encoder, or merge at its size"
        )


def _check_targets(encoder: Encoder, where: str, manifest: Manifest) -> None:
    target = manifest.layout.array("target")
    if target is not None and target.shape != (encoder.embedding_dim,):
        raise ConfigError(
            f"encoder {encoder.spec!r} gives embeddings of width {encoder.embedding_dim}, found "
            f"targets of shape "
            f"{target.shape} in {where}; choose the --encoder that made them"
        )
    recorded = _recorded(manifest).get("sha256")
    if recorded is not None and recorded != encoder.sha256:
        warn(
            f"the targets of {where} come from another encoder "
            f"({_recorded(manifest).get('spec')}, sha256 "
            f"{str(recorded)[:12]}) than the one that is trained ({encoder.spec}, sha256 "
            f"{encoder.sha256[:12]})"
        )


def _head(config: TrainConfig, artifact: Artifact, loss_name: str) -> Head | None:
    """The frozen classifier behind the encoder, or None where the encoder's outputs are what is trained."""
    if loss_name != "cross_entropy":
        return None
    stored = artifact.head()
    if config.head is not None and config.head != ARTIFACT_HEAD:
        return load_head(config.head, stored[1] if stored else ())
    if stored is None and config.head is not None:
        raise ConfigError(f"head: found none in {config.artifact}; give a file or spec with --head")
    return None if stored is None else head_from_arrays(*stored)
