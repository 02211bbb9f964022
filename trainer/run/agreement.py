"""Check whether several artifacts can be trained on together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from datamerge.runtime.messages import warn
from storage_schemas import Artifact, ConfigError, shortened
from storage_schemas.schema.manifest import HEAD, Manifest
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.preprocessing import Preprocessing
from trainer.arms import ARMS
from trainer.config import TrainConfig
from trainer.run.clean_images import attacked_within
from trainer.run.requirements import Checked, check, label_names, pixel_moments, recorded_encoder

Difference = tuple[str, object, object]
"""Name of a property that two artifacts should share, and its value in each."""


def of_artifact(config: TrainConfig, number: int) -> TrainConfig:
    """The settings of the same run on only one of its artifacts, which messages then name."""
    return config.model_copy(update={"artifact": config.artifacts[number].url})


def check_all(config: TrainConfig, artifacts: Sequence[Artifact]) -> Checked:
    """Check the settings against the artifacts, and the artifacts against each other.

    Returns:
        The result of `check` for the first artifact, which holds for the others too.

    Raises:
        ConfigError: settings and artifacts, or two artifacts, are incompatible.
    """
    found = [check(of_artifact(config, number), artifact.manifest) for number, artifact in enumerate(artifacts)]
    first, urls = artifacts[0], [artifact.location.url for artifact in artifacts]
    for number, artifact in enumerate(artifacts[1:], start=1):
        _check_other(artifacts[:number], artifact)
        if found[number].members != found[0].members:
            raise ConfigError(
                f"members: expected the same number in all artifacts, found {found[0].members} in {urls[0]} and "
                f"{found[number].members} in {urls[number]}; set `members={min(one.members for one in found)}`"
            )
        different = [*_differences(first.manifest, artifact.manifest)]
        if found[number].clean != found[0].clean:
            different.append(("clean images as", found[0].clean, found[number].clean))
        if not ARMS[config.arm].starts_clean:
            different += _different_attacks(first.manifest, artifact.manifest)
        if found[0].labels:
            different += _different_classes(config, first, artifact)
        else:
            different += _different_targets(first.manifest, artifact.manifest)
        if different:
            values = ", ".join(
                f"{what} {shortened(mine)} in {urls[0]} and {shortened(theirs)} in {urls[number]}"
                for what, mine, theirs in different
            )
            raise ConfigError(
                f"artifact: expected artifacts that agree, found {values}; merge one of them again, or leave it out"
            )
    same = len({one.title for one in found}) == 1
    return found[0] if same else dataclasses.replace(found[0], title=ARMS[config.arm].name(None))


def _check_other(before: Sequence[Artifact], artifact: Artifact) -> None:
    """Refuse an artifact whose groups are already listed."""
    for other in before:
        if other.manifest.plan_sha256 == artifact.manifest.plan_sha256:
            raise ConfigError(
                f"artifact: expected different ones, found the groups of {other.location.url} again in "
                f"{artifact.location.url}; write {other.location.url}=2 to take each of them twice"
            )


def _differences(one: Manifest, other: Manifest) -> Iterator[Difference]:
    """Differences that forbid training on both artifacts, whatever the loss."""
    shapes = [moments.shape if (moments := pixel_moments(manifest)) else None for manifest in (one, other)]
    if shapes[0] != shapes[1]:
        yield "pixels", shapes[0], shapes[1]
    encoders = [recorded_encoder(manifest) for manifest in (one, other)]
    hashes = [encoder.get("sha256") for encoder in encoders]
    if hashes[0] != hashes[1] and None not in hashes:
        named = [f"{encoder.get('spec')} (sha256 {str(encoder['sha256'])[:12]})" for encoder in encoders]
        yield "encoder", named[0], named[1]
    pixels = [Preprocessing.of_artifact(manifest.provenance, "provenance") for manifest in (one, other)]
    # Releases before 0.2.0 recorded the same preprocessing for every encoder; `check_groups` only warns about that.
    if pixels[0] is not None and pixels[1] is not None and all(one.is_complete for one in pixels if one):
        for phrase in pixels[0].differences(pixels[1]):
            mine, _, theirs = phrase.partition(", not ")
            name, _, value = mine.partition(" ")
            yield name, value, theirs


def _different_attacks(one: Manifest, other: Manifest) -> Iterator[Difference]:
    radii = [attacked_within(manifest) for manifest in (one, other)]
    lengths = [None if radius is None else PixelLength(radius) for radius in radii]
    if lengths[0] != lengths[1]:
        values = ["no attack" if length is None else str(length) for length in lengths]
        yield "epsilon", values[0], values[1]


def _different_targets(one: Manifest, other: Manifest) -> Iterator[Difference]:
    targets = [manifest.layout.array("target") for manifest in (one, other)]
    shapes = [None if target is None else target.shape for target in targets]
    if shapes[0] != shapes[1]:
        yield "targets", shapes[0], shapes[1]


def _different_classes(config: TrainConfig, one: Artifact, other: Artifact) -> Iterator[Difference]:
    names = [label_names(artifact) for artifact in (one, other)]
    if not names[0] or not names[1]:
        if names[0] or names[1]:
            nameless = (other if names[0] else one).location.url
            warn(f"artifact: {nameless} has no class names; its labels are taken for the classes of the others")
    elif names[0] != names[1]:
        if len(names[0]) != len(names[1]):
            yield "classes", len(names[0]), len(names[1])
        label = next((label for label, pair in enumerate(zip(*names, strict=False)) if pair[0] != pair[1]), None)
        if label is not None:
            yield f"class {label}", names[0][label], names[1][label]
    heads = [file.sha256 for artifact in (one, other) for file in artifact.manifest.files if file.path == HEAD]
    if config.head in (None, "artifact") and len(set(heads)) > 1:
        yield "class head", f"sha256 {heads[0][:12]}", f"sha256 {heads[1][:12]}"
