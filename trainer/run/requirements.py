"""Whether an artifact, an encoder and the settings go together; what does not is refused by name."""

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

# Shards whose labels are checked before anything starts; those of the others are checked as they are read.
EAGER_SHARDS = 64
SIDECARS_AT_ONCE = 16  # small files: what a read takes is the way to the store and back


@dataclass(frozen=True)
class Checked:
    """What an artifact and the settings come to.

    Attributes:
        loss: that "auto" means, or that was asked for.
        members: stored members to read of each group; 0 for arms that read none.
        encoder: spec of the encoder to start from, or the folder of a run.
        refinement: steps of an attack on stored images before they are trained on, if there are any.
        clean: the quantity that is the clean image, where it is taken.
        title: the arm in the words of the paper.
    """

    loss: LossName
    members: int
    encoder: str
    refinement: Refinement | None
    clean: CleanName | None
    title: str

    @property
    def labels(self) -> bool:
        """Whether targets are labels, not embeddings."""
        return self.loss == "cross_entropy"


def check(config: TrainConfig, manifest: Manifest) -> Checked:
    """Check the settings against what the manifest says, before anything large is read.

    Raises:
        ConfigError: they do not go together.
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
    """Check a held-out artifact, `config.artifact`, against what the run trains with.

    Returns:
        Stored members to read of each group.

    Raises:
        ConfigError: it lacks what the loss that is trained on takes.
    """
    _loss(config.model_copy(update={"loss": found.loss}), manifest)
    if found.clean is not None and clean_name(manifest) is None:
        raise ConfigError(
            f"eval_artifact: the loss that is trained on takes the clean images; found none in {config.artifact}; "
            'merge it again with `attack="none"` or `keep_clean=True`, or drop `eval_artifact`'
        )
    return _stored_members(config, manifest)


def check_apart(config: TrainConfig, manifest: Manifest, held_out: Manifest) -> None:
    """Refuse a held-out artifact that is the one that is trained on; warn of one that is made of the same images.

    Raises:
        ConfigError: they are one.
    """
    if held_out.plan_sha256 == manifest.plan_sha256:
        raise ConfigError(
            f"eval_artifact: expected groups that are not trained on, found those of {config.artifact} itself; merge "
            "other images for it, or drop `eval_artifact`"
        )
    trained, other = (_source_fingerprint(one) for one in (manifest, held_out))
    if trained is not None and trained == other:
        warn(
            f"eval_artifact: {config.eval_artifact} is made of the images that are trained on; its loss says nothing "
            "of others"
        )


def _source_fingerprint(manifest: Manifest) -> object:
    source = manifest.provenance.get("source")
    return source.get("fingerprint") if isinstance(source, dict) else None


def check_groups(artifact: Artifact, encoder: Encoder, collate: Collate) -> None:
    """Check that an artifact's groups go through an encoder.

    Raises:
        ConfigError: pixels, targets or labels do not fit it.
    """
    _check_pixels(encoder, artifact.location.url, artifact.manifest)
    if not collate.labels:
        _check_targets(encoder, artifact.location.url, artifact.manifest)
        return
    for entry in _first_records(artifact):
        check_label(f"{entry.key} of {artifact.location.url}", entry.label, collate.classes, collate.rows)


def _first_records(artifact: Artifact) -> Iterator[RecordEntry]:
    """Records of the first `EAGER_SHARDS` shards; their sidecars are asked for at once."""
    positions = range(min(len(artifact.shard_sizes), EAGER_SHARDS))
    with in_threads(SIDECARS_AT_ONCE, artifact.commit, positions) as commits:
        for commit in commits:
            yield from commit.records


def label_names(artifact: Artifact) -> list[str]:
    """What an artifact calls its labels: as the rows of its head, or as the classes of its source; may be empty."""
    head = artifact.head()
    if head is not None and head[1]:
        return head[1]
    source = artifact.manifest.provenance.get("source")
    names = source.get("class_names") if isinstance(source, dict) else None
    return [str(name) for name in names] if isinstance(names, list) else []


def matched_rows(artifact: Artifact, classes: Classes, setting: str) -> Mapping[int, int] | None:
    """By label of an artifact, the class that it is of those that are trained; None if all are the same number.

    Labels are matched by name where both sides have names, by position otherwise.

    Args:
        artifact: whose labels they are; those of the first `EAGER_SHARDS` shards must have a class.
        classes: that are trained.
        setting: that brings the two together.

    Raises:
        ConfigError: a class that is not trained.
    """
    labels = {entry.label for entry in _first_records(artifact) if entry.label is not None}
    names = label_names(artifact)
    own = Classes(names, len(names), artifact.location.url)
    match = match_classes(labels, own, classes, setting, f"choose another `{setting}`")
    return match.rows if match.moves(len(names) or classes.count) else None


def check_recorded(config: TrainConfig, manifest: Manifest, encoder: Encoder) -> None:
    """Only weights whose hash an artifact states are taken from where it says they are.

    A path may be that of any file here, and what a hub has under a name changes.

    Raises:
        ConfigError: other weights, and nobody asked for them.
    """
    spec = encoder.spec
    parsed = parse_spec(spec)
    named = config.encoder is None and (parsed.checkpoint is not None or parsed.whole)
    if named and encoder.sha256 != recorded_encoder(manifest).get("sha256"):
        raise _unverified(config, "the weights that its targets come from", f"others in {spec}")


def check_attacked(config: TrainConfig, found: Checked, manifest: Manifest, encoder: Encoder) -> None:
    """Refuse to train an encoder towards its own outputs on images that nobody attacked.

    Raises:
        ConfigError: every loss of the run would be 0.
    """
    unattacked = ARMS[config.arm].starts_clean or are_clean(manifest.provenance)
    if found.labels or found.refinement or not unattacked:
        return
    if encoder.sha256 == recorded_encoder(manifest).get("sha256"):
        raise ConfigError(
            f"refine_steps: expected 1 or more, found 0: the images of {config.artifact} are clean, and the encoder "
            'gives their targets already; set `arm="clean"`, `refine_steps=1` and `epsilon`'
        )


def recorded_encoder(manifest: Manifest) -> dict[str, Any]:
    """What the artifact says of the encoder its targets come from."""
    encoder = manifest.provenance.get("encoder")
    return encoder if isinstance(encoder, dict) else {}


def _starting_encoder(config: TrainConfig, manifest: Manifest) -> str:
    """The encoder to start from: the one asked for, or the one that the artifact's targets come from.

    Raises:
        ConfigError: the artifact names none, or one that would run code of its choice.
    """
    if config.encoder is not None:
        return config.encoder
    spec = recorded_encoder(manifest).get("spec")
    if not isinstance(spec, str):
        raise ConfigError(f"encoder: expected the name of one in {config.artifact}, found none; set `encoder`")
    # An artifact may come from anybody. A factory is code, and unpickling ran some in torch before 2.6.
    if spec.startswith("python:"):
        raise _unverified(config, "an encoder that needs no code of its own", spec)
    checkpoint = parse_spec(spec).checkpoint
    if checkpoint is not None and Path(checkpoint).suffix != ".safetensors":
        raise _unverified(config, "weights in a .safetensors file", checkpoint)
    return with_tag_of_run(spec)


def _unverified(config: TrainConfig, expected: str, found: str) -> ConfigError:
    # The spec is not part of the advice: nobody should paste what a stranger's artifact says into a shell.
    return ConfigError(
        f"encoder: expected {expected} in {config.artifact}, found {found}; if that is yours, set `encoder` to it"
    )


def _loss(config: TrainConfig, manifest: Manifest) -> LossName:
    """The loss that "auto" means, or the one that was asked for if the artifact has what it takes."""
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
    """Stored members to read of each group, once the artifact is seen to have all that the arm reads."""
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
            "take fewer `members`"
        )
    return config.members or stored.shape[0]


def pixel_moments(manifest: Manifest) -> ArraySpec | None:
    """The array of either encoding that has the pixels' shape, if any is listed."""
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
    # Releases before 0.2.0 recorded one way of resizing, whichever the encoder needed, and no normalisation.
    if not recorded.is_complete:
        warn(f"{encoder.spec!r} takes other pixels than those of {where}: {'; '.join(different)}")
        return
    raise ConfigError(
        f"encoder: expected one for the pixels of {where}, found other ones of {encoder.spec!r}: "
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
        warn(f"the targets of {where} come from other code than that of {encoder.spec} now; its weights are the same")
    if recorded is not None and recorded != encoder.sha256:
        warn(
            f"the targets of {where} come from another encoder ({recorded_encoder(manifest).get('spec')}, sha256 "
            f"{str(recorded)[:12]}) than the one that is trained ({encoder.spec}, sha256 {encoder.sha256[:12]})"
        )
