"""The clean images of an artifact, and the attack around them that a run makes from its settings."""

from __future__ import annotations

from typing import Any

from storage_schemas import ConfigError, Manifest
from storage_schemas.schema.pixel_length import PixelLength
from storage_schemas.schema.provenance import are_clean
from trainer.arms import ARMS, CleanName
from trainer.config import TrainConfig
from trainer.run.refine import Refinement


def group_size(manifest: Manifest) -> int | None:
    """Number of members of every group; None if it varies."""
    grouping = manifest.provenance.get("grouping")
    size = grouping.get("members") if isinstance(grouping, dict) else None
    return size if isinstance(size, int) else None


def attacked_within(manifest: Manifest) -> Any:
    """Radius of the attack that made the members, as the manifest spells it; None if there was no attack."""
    attack = manifest.provenance.get("attack")
    return attack.get("epsilon") if isinstance(attack, dict) else None


def clean_name(manifest: Manifest) -> CleanName | None:
    """The quantity of a record that holds its clean image: `clean`, or `mean` for groups of one unattacked image.

    The manifest of a union of artifacts holds only what all of them share. So a missing radius alone does not prove
    that the images are unattacked; the artifacts may have had different radii.
    """
    if manifest.layout.array("clean") is not None:
        return "clean"
    grouping = manifest.provenance.get("grouping")
    of_samples = isinstance(grouping, dict) and grouping.get("kind") in ("label", "cluster", "column")
    unattacked = are_clean(manifest.provenance) or of_samples
    return "mean" if unattacked and group_size(manifest) == 1 else None


def clean_images(config: TrainConfig, manifest: Manifest) -> CleanName | None:
    """The quantity that holds the clean image; None if the run does not need clean images.

    Raises:
        ConfigError: the run needs clean images and the artifact has none.
    """
    starts_clean = ARMS[config.arm].starts_clean
    if not (starts_clean or config.refine_steps or config.clean_weight):
        return None
    found = clean_name(manifest)
    if found is None:
        setting = "arm" if starts_clean else "refine_steps" if config.refine_steps else "clean_weight"
        drop = "choose another `arm`" if starts_clean else f"drop `{setting}`"
        raise ConfigError(
            f"{setting}: expected an artifact that keeps the clean images, found none in {config.artifact}; merge "
            f'again with `attack="none"` or `keep_clean=True`, or {drop}'
        )
    return found


def refinement(config: TrainConfig, manifest: Manifest) -> Refinement | None:
    """Settings of the PGD steps before each update; None without `refine_steps`.

    Raises:
        ConfigError: settings and artifact give no radius, or two different ones.
    """
    epsilon = _epsilon(config, manifest)
    if not config.refine_steps:
        return None
    if epsilon is None:
        raise ConfigError(
            f"epsilon: expected a radius for `refine_steps`, found none in the settings or in {config.artifact}, "
            'whose images are clean; set it, such as `epsilon="2/255"`'
        )
    starts_clean = ARMS[config.arm].starts_clean or attacked_within(manifest) is None
    noise = config.start_noise if config.start_noise is not None else epsilon if starts_clean else 0
    # A total length of twice the radius reaches the other side of the ball, and was best in experiments/cifar10.
    size = 2 * epsilon / config.refine_steps if config.refine_step_size is None else config.refine_step_size
    return Refinement(config.refine_steps, float(size), float(epsilon), float(noise))


def _epsilon(config: TrainConfig, manifest: Manifest) -> PixelLength | None:
    """Radius of the attacks that the run trains on, stored or made from clean images; None if there are none.

    Raises:
        ConfigError: the stored attacks have another radius than the settings.
    """
    found = attacked_within(manifest)
    stored = None if found is None else PixelLength(found)
    from_clean = config.refine_steps and (ARMS[config.arm].starts_clean or stored is None)
    if config.epsilon is not None and not from_clean and stored != config.epsilon:
        raise ConfigError(
            f"epsilon: expected an artifact attacked within {config.epsilon}, found {found or 'no attack'} in "
            f"{config.artifact}; choose another `artifact` or `epsilon`"
        )
    return config.epsilon or stored
