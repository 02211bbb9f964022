"""Check that artifact, encoder and settings are compatible; messages name the setting to change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamerge.encoders import Encoder, parse_spec
from datamerge.encoders.classes import Classes, match_classes
from datamerge.encoders.runs import with_tag_of_run
from datamerge.runtime.messages import warn
from storage_schemas import Artifact, ConfigError, DatamergeError, Manifest
from storage_schemas.access.threads import in_threads
from storage_schemas.schema.manifest import ArraySpec, RecordEntry
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import are_clean
from trainer.arms import ARMS, CleanName
from trainer.config import TrainConfig
from trainer.data.stream import Collate, check_label
from trainer.losses import LossName
from trainer.run.clean_images import clean_images, clean_name, group_size, refinement
from trainer.run.refine import Refinement

# Number of shards whose labels are checked before training starts; later labels are checked when they are read.
EAGER_SHARDS = 64
SIDECARS_AT_ONCE = 16  # concurrent reads of small files, which are bound by latency


@dataclass(frozen=True)
class Checked:
    """Settings resolved against an artifact.

    Attributes:
        loss: the loss, with "auto" resolved.
        members: number of stored members to use of each group; 0 for arms that read none.
        encoder: spec of the encoder to start from, or the folder of a run.
        refinement: PGD steps on stored images before each update; None without `refine_steps`.
        clean: quantity that holds the clean image; None if the run does not need clean images.
        title: the paper's name for the arm.
    """

    loss: LossName
    members: int
    encoder: str
    refinement: Refinement | None
    clean: CleanName | None
    title: str

    @property
    def labels(self) -> bool:
        """Whether targets are labels rather than embeddings."""
        return self.loss == "cross_entropy"


def check(config: TrainConfig, manifest: Manifest) -> Checked:
    """Check the settings against the manifest, before anything large is read.

    Raises:
        ConfigError: settings and artifact are incompatible.
    """
    loss = _loss(config, manifest)
    members, arm = _stored_members(config, manifest), ARMS[config.arm]
    return Checked(
        loss=loss,
        members=members,
        encoder=_starting_encoder(config, manifest),
        refinement=refinement(config, manifest),
        clean=clean_images(config, manifest),
        title=arm.name(members or group_size(manifest), config.refine_steps),
    )


def check_held_out(config: TrainConfig, found: Checked, manifest: Manifest) -> int:
    """Check that a held-out artifact, `config.artifact`, has all that the training loss needs.

    Returns:
        Number of stored members to use of each group.

    Raises:
        ConfigError: the artifact lacks something.
    """
    _loss(config.model_copy(update={"loss": found.loss}), manifest)
    if found.clean is not None and clean_name(manifest) is None:
        raise ConfigError(
            f"eval_artifact: expected clean images, which the training loss needs, found none in {config.artifact}; "
            'merge it again with `attack="none"` or `keep_clean=True`, or drop `eval_artifact`'
        )
    return _stored_members(config, manifest)


def check_apart(config: TrainConfig, manifest: Manifest, held_out: Manifest) -> None:
    """Refuse to hold out the training artifact itself; warn if the held-out one is made of the same images.

    Raises:
        ConfigError: both are the same artifact.
    """
    if held_out.plan_sha256 == manifest.plan_sha256:
        raise ConfigError(
            f"eval_artifact: expected groups that are not trained on, found those of {config.artifact} itself; merge "
            "other images for it, or drop `eval_artifact`"
        )
    trained, other = (_source_fingerprint(one) for one in (manifest, held_out))
    if trained is not None and trained == other:
        warn(
            f"eval_artifact: {config.eval_artifact} is made of the training images; its loss does not measure "
            "generalisation to others"
        )


def _source_fingerprint(manifest: Manifest) -> object:
    source = manifest.provenance.get("source")
    return source.get("fingerprint") if isinstance(source, dict) else None


def check_groups(artifact: Artifact, encoder: Encoder, collate: Collate) -> None:
    """Check that an encoder can be trained on an artifact's groups.

    Raises:
        ConfigError: pixels, targets or labels do not match the encoder.
    """
    _check_pixels(encoder, artifact.location.url, artifact.manifest)
    if not collate.labels:
        _check_targets(encoder, artifact.location.url, artifact.manifest)
        return
    for entry in _first_records(artifact):
        check_label(f"{entry.key} of {artifact.location.url}", entry.label, collate.classes, collate.rows)


def _first_records(artifact: Artifact) -> Iterator[RecordEntry]:
    """Records of the first `EAGER_SHARDS` shards, whose sidecars are read concurrently."""
    positions = range(min(len(artifact.shard_sizes), EAGER_SHARDS))
    with in_threads(SIDECARS_AT_ONCE, artifact.commit, positions) as commits:
        for commit in commits:
            yield from commit.records


def label_names(artifact: Artifact) -> list[str]:
    """Class names of an artifact's labels, from its head or else from its source; may be empty."""
    head = artifact.head()
    if head is not None and head[1]:
        return head[1]
    source = artifact.manifest.provenance.get("source")
    names = source.get("class_names") if isinstance(source, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def matched_rows(artifact: Artifact, classes: Classes, setting: str) -> Mapping[int, int] | None:
    """Class in training of each label of an artifact; None if they are the same number.

    Labels are matched by name if both sides have names, otherwise by position.

    Args:
        artifact: the artifact; all labels of its first `EAGER_SHARDS` shards must have a class.
        classes: the classes in training.
        setting: the setting to name in messages.

    Raises:
        ConfigError: a label has no class in training.
    """
    labels = {entry.label for entry in _first_records(artifact) if entry.label is not None}
    names = label_names(artifact)
    own = Classes(names, len(names), artifact.location.url)
    match = match_classes(labels, own, classes, setting, f"choose another `{setting}`")
    return match.rows if match.moves(len(names) or classes.count) else None


def check_recorded(config: TrainConfig, manifest: Manifest, encoder: Encoder) -> None:
    """Refuse weights from a place that the artifact names unless their hash is the one it records.

    A path in an untrusted artifact may name any local file, and the contents of a hub change.

    Raises:
        ConfigError: the weights have another hash, and the setting `encoder` does not name them.
    """
    spec = encoder.spec
    parsed = parse_spec(spec)
    named = config.encoder is None and (parsed.checkpoint is not None or parsed.whole)
    if named and encoder.sha256 != recorded_encoder(manifest).get("sha256"):
        raise _unverified(config, "the weights that its targets come from", f"others in {spec}")


def check_attacked(config: TrainConfig, found: Checked, manifest: Manifest, encoder: Encoder) -> None:
    """Refuse to train an encoder towards its own embeddings of clean images, where every loss is 0.

    Raises:
        ConfigError: the images are clean, the targets are the encoder's own, and nothing refines the images.
    """
    unattacked = ARMS[config.arm].starts_clean or are_clean(manifest.provenance)
    if found.labels or found.refinement or not unattacked:
        return
    if encoder.sha256 == recorded_encoder(manifest).get("sha256"):
        raise ConfigError(
            f"refine_steps: expected 1 or more, found 0: the images of {config.artifact} are clean, and their "
            'targets are the outputs of the same encoder; set `arm="clean"`, `refine_steps=1` and `epsilon`'
        )


def recorded_encoder(manifest: Manifest) -> dict[str, Any]:
    """The artifact's record of the encoder that made its targets; empty if there is none."""
    encoder = manifest.provenance.get("encoder")
    return encoder if isinstance(encoder, dict) else {}


def _starting_encoder(config: TrainConfig, manifest: Manifest) -> str:
    """The encoder to start from: the setting `encoder`, or else the encoder that made the artifact's targets.

    Raises:
        ConfigError: the artifact names no encoder, or one whose loading could run code.
    """
    if config.encoder is not None:
        return config.encoder
    spec = recorded_encoder(manifest).get("spec")
    if not isinstance(spec, str):
        raise ConfigError(f"encoder: expected {config.artifact} to name an encoder, found none; set `encoder`")
    # Artifacts are untrusted. A factory is code, and unpickling could run code in torch before 2.6.
    if spec.startswith("python:"):
        raise _unverified(config, "an encoder that needs no code of its own", spec)
    checkpoint = parse_spec(spec).checkpoint
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise _unverified(config, "weights in a .safetensors file", checkpoint)
    return with_tag_of_run(spec)


def _unverified(config: TrainConfig, expected: str, found: str) -> ConfigError:
    # The advice does not repeat the spec: nobody should paste text from an untrusted artifact into a shell.
    return ConfigError(
        f"encoder: expected {expected} in {config.artifact}, found {found}; if you trust that, set `encoder` to it"
    )


def _loss(config: TrainConfig, manifest: Manifest) -> LossName:
    """The loss, with "auto" resolved, if the artifact has the targets or labels that it needs."""
    has_targets = manifest.layout.array("target") is not None
    automatic: LossName = "squared_error" if has_targets else "cross_entropy"
    name = automatic if config.loss == "auto" else config.loss
    if name != "cross_entropy" and not has_targets:
        raise ConfigError(
            f"loss: {name} expects stored target embeddings, found none in {config.artifact}; "
            'use `loss="cross_entropy"` for an artifact with labels'
        )
    if name != "cross_entropy" and config.head is not None:
        raise ConfigError(f"head: {name} trains on embeddings and takes no head; drop `head`")
    if name == "cross_entropy" and config.loss_scale != 1.0:
        raise ConfigError(
            f"loss_scale: only the squared error is scaled, found {config.loss_scale} with cross_entropy; "
            "drop `loss_scale`"
        )
    if name == "cross_entropy" and config.clean_weight:
        raise ConfigError(
            f"clean_weight: the clean term expects stored target embeddings, found none in {config.artifact}; drop "
            "`clean_weight`"
        )
    return name


def _stored_members(config: TrainConfig, manifest: Manifest) -> int:
    """Check that the artifact has the arrays of the arm; returns the number of stored members to use per group."""
    arm = ARMS[config.arm]
    if "factors" in arm.arrays and manifest.layout.array("factors") is None:
        raise ConfigError(
            f"arm: {config.arm} expects stored factors, found none in {config.artifact}; merge again with "
            '`factors=1`, or use `arm="avg"`'
        )
    if not arm.takes_members:
        return 0
    stored = manifest.layout.array("members")
    if stored is None:
        raise ConfigError(
            f"arm: {config.arm} expects stored members, found none in {config.artifact}; merge again with "
            f'`keep_members=True`, or use `arm="{"clean" if are_clean(manifest.provenance) else "avg"}"`'
        )
    if config.members is not None and config.members > stored.shape[0]:
        raise ConfigError(
            f"members: expected at most the {stored.shape[0]} stored in {config.artifact}, found {config.members}; "
            "use fewer `members`"
        )
    return config.members or stored.shape[0]


def pixel_moments(manifest: Manifest) -> ArraySpec | None:
    """The array with the shape of the pixels, in either encoding; None if the manifest lists none."""
    return manifest.layout.array("sum") or manifest.layout.array("mean")


def _check_pixels(encoder: Encoder, where: str, manifest: Manifest) -> None:
    moments = pixel_moments(manifest)
    if moments is None:
        raise DatamergeError(f"{where}: its manifest lists neither sum nor mean; the artifact is not usable")
    if moments.shape != tuple(encoder.input_shape):
        raise ConfigError(
            f"encoder: {encoder.spec!r} takes pixels {tuple(encoder.input_shape)}, found {moments.shape} in "
            f"{where}; choose another `encoder`, or merge at its size"
        )
    recorded = Preprocessing.of_artifact(manifest.provenance, where)
    different = [] if recorded is None else encoder.preprocessing.differences(recorded)
    if recorded is None or not different:
        return
    # Releases before 0.2.0 recorded the same resizing for every encoder, and no normalisation.
    if not recorded.is_complete:
        warn(f"{encoder.spec!r} preprocesses images differently from {where}: {'; '.join(different)}")
        return
    raise ConfigError(
        f"encoder: expected the preprocessing of {where}, found a different one of {encoder.spec!r}: "
        f"{'; '.join(different)}; choose another `encoder`, or merge again for this one"
    )


def _check_targets(encoder: Encoder, where: str, manifest: Manifest) -> None:
    target = manifest.layout.array("target")
    if target is not None and target.shape != (encoder.embedding_dim,):
        raise ConfigError(
            f"encoder: {encoder.spec!r} gives embeddings of width {encoder.embedding_dim}, found targets of shape "
            f"{target.shape} in {where}; choose the `encoder` that made them"
        )
    found = recorded_encoder(manifest)
    recorded = found.get("sha256")
    if recorded == encoder.sha256 and found.get("code_sha256", encoder.code) != encoder.code:
        warn(f"the targets of {where} come from another version of the code of {encoder.spec}, with the same weights")
    if recorded is not None and recorded != encoder.sha256:
        warn(
            f"the targets of {where} come from another encoder ({recorded_encoder(manifest).get('spec')}, sha256 "
            f"{str(recorded)[:12]}) than the one in training ({encoder.spec}, sha256 {encoder.sha256[:12]})"
        )
