"""From settings to everything a run needs; artifact, encoder and settings that do not fit are refused by name.

Nothing is written here and nothing is trained; a request that cannot work fails before it costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from adversarial import Encoder, Head, head_from_arrays, load_encoder, load_head, weights_sha256
from storage_schemas import Artifact, ConfigError, DatamergeError, Manifest, open_artifact
from trainer.config import TrainConfig
from trainer.logs import warn
from trainer.losses import CrossEntropy, Loss, SquaredError
from trainer.order import Order
from trainer.stream import Collate

# Settings that say where and how fast, not what comes out; they may differ when a run is continued.
_FREE = {
    "artifact",
    "run",
    "epochs",
    "device",
    "checkpoint_every",
    "keep_checkpoints",
    "data_workers",
    "threads",
    "log_every",
}
ARTIFACT_HEAD = "artifact"


@dataclass(frozen=True)
class Job:
    """A run that can start.

    Attributes:
        config: the settings with every default resolved; `steps` is set and `epochs` is not.
        artifact: opened.
        encoder: on its device, with the weights the run starts from.
        model: pixels → outputs: the encoder, followed by the frozen head if there is one.
        loss: loss of one image.
        order: which groups form which step.
        collate: what is read of each group.
        device: where the encoder is.
        identity: settings and hashes that determine the result.
    """

    config: TrainConfig
    artifact: Artifact
    encoder: Encoder
    model: nn.Module
    loss: Loss
    order: Order
    collate: Collate
    device: torch.device
    identity: dict[str, Any]

    @property
    def steps(self) -> int:
        """Length of the run."""
        return cast(int, self.config.steps)


def make_job(config: TrainConfig) -> Job:
    """Open the artifact, load the encoder and check that they go together.

    Raises:
        ConfigError: they do not, or not with these settings.
        NotAnArtifact: nothing to train on at `config.artifact`.
    """
    device = _device(config.device)
    artifact = open_artifact(config.artifact)
    manifest = artifact.manifest
    if not len(artifact):
        raise ConfigError(f"{config.artifact}: expected groups to train on, found none")
    loss_name = _loss_name(config, manifest)
    members = _members(config, manifest)
    order = Order(artifact.shard_sizes, config.batch_size, config.seed)
    steps = config.steps or (config.epochs or 0) * order.steps_per_epoch
    if config.warmup_steps >= steps:
        raise ConfigError(
            f"warmup_steps: expected fewer than the run's {steps} steps, found {config.warmup_steps}; "
            f"add --warmup {steps // 10}"
        )
    spec = config.encoder or _recorded(manifest).get("spec")
    if not isinstance(spec, str):
        raise ConfigError(f"{config.artifact} names no encoder; add --encoder SPEC")
    encoder = load_encoder(spec, str(device))
    _check_pixels(encoder, config, manifest)
    head = _head(config, artifact, loss_name)
    if loss_name == "squared_error":
        _check_targets(encoder, config, manifest)
    else:
        _check_labels(encoder, head, config, artifact)
    if encoder.random_weights:
        warn(f"encoder {spec} starts from random weights; nobody has trained it")

    resolved = _resolved(config, artifact, loss_name, encoder, head, steps).model_copy(update={"device": str(device)})
    return Job(
        config=resolved,
        artifact=artifact,
        encoder=encoder,
        model=encoder if head is None else nn.Sequential(encoder, head.to(device)),
        loss=SquaredError(config.loss_scale) if loss_name == "squared_error" else CrossEntropy(),
        order=order,
        collate=Collate(arm=config.arm, labels=loss_name == "cross_entropy", members=members),
        device=device,
        identity={
            **{name: value for name, value in resolved.model_dump(mode="json").items() if name not in _FREE},
            "plan_sha256": manifest.plan_sha256,
            "encoder_sha256": encoder.sha256,
            "head_sha256": None if head is None else weights_sha256(head),
        },
    )


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


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
    if config.arm != "ind":
        return 0
    stored = manifest.layout.array("members")
    if stored is None:
        raise ConfigError(
            f"arm: ind expects stored members, found none in {config.artifact}; merge again with "
            f"its members kept, "
            "or use --arm avg"
        )
    if config.members is not None and config.members > stored.shape[0]:
        raise ConfigError(
            f"members: expected at most the {stored.shape[0]} stored in {config.artifact}, found {config.members}"
        )
    return config.members or stored.shape[0]


def _check_pixels(encoder: Encoder, config: TrainConfig, manifest: Manifest) -> None:
    moments = manifest.layout.array("sum") or manifest.layout.array("mean")
    if moments is None:
        raise DatamergeError(
            f"{config.artifact}: its manifest lists neither sum nor mean; the artifact is not usable"
        )
    if moments.shape != tuple(encoder.input_shape):
        raise ConfigError(
            f"encoder {encoder.spec!r} takes pixels {tuple(encoder.input_shape)}, found {moments.shape} in "
            f"{config.artifact}; choose another --encoder, or merge at its size"
        )


def _check_targets(encoder: Encoder, config: TrainConfig, manifest: Manifest) -> None:
    target = manifest.layout.array("target")
    if target is not None and target.shape != (encoder.embedding_dim,):
        raise ConfigError(
            f"encoder {encoder.spec!r} gives embeddings of width {encoder.embedding_dim}, found "
            f"targets of shape "
            f"{target.shape} in {config.artifact}; choose the --encoder that made them"
        )
    recorded = _recorded(manifest).get("sha256")
    if recorded is not None and recorded != encoder.sha256:
        warn(
            f"the targets of {config.artifact} come from another encoder "
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


def _check_labels(encoder: Encoder, head: Head | None, config: TrainConfig, artifact: Artifact) -> None:
    if head is not None:
        head.check_width(encoder.embedding_dim, "head")
    classes = encoder.embedding_dim if head is None else head.weight.shape[0]
    source = f"the outputs of encoder {encoder.spec!r}" if head is None else "the head"
    for position in range(len(artifact.shard_sizes)):
        for entry in artifact.commit(position).records:
            if entry.label is None:
                raise ConfigError(
                    f"loss: cross_entropy expects a label for every group, found none for record "
                    f"{entry.key} of "
                    f"{config.artifact}; use --loss squared_error"
                )
            if not 0 <= entry.label < classes:
                raise ConfigError(
                    f"loss: cross_entropy expects labels below {classes}, the classes of {source}, "
                    f"found label "
                    f"{entry.label} at record {entry.key} of {config.artifact}; choose another "
                    f"--head or --encoder"
                )
