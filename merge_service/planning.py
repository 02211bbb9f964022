"""Before any work: which groups, in which shards, stored how. A pure function of settings, source and encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from adversarial import Encoder, Head
from merge_service.config import MergeConfig
from sources import BadImage, Sample, Source, decode, native_shape
from storage_schemas import ArraySpec, ConfigError, Layout, SourceError
from storage_schemas.moments import LEVELS, scatter_dtype, sum_dtype

# Bytes depend on these: decoding, resizing and arithmetic.
VERSIONED = ("datamerge", "numpy", "pillow", "torch")


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that become one record."""

    key: str
    samples: tuple[Sample, ...]
    label: int | None


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One unit of work: the groups of one shard."""

    shard: int
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Plan:
    """All that is known before the first shard."""

    tasks: Sequence[ShardTask]
    layout: Layout
    provenance: dict[str, Any]
    shape: tuple[int, int, int]


def make_plan(config: MergeConfig, source: Source, encoder: Encoder | None, head: Head | None) -> Plan:
    """Plan groups, shards, arrays and provenance.

    Raises:
        ConfigError, SourceError: settings that do not go with the data.
    """
    groups = _label_groups(config, source) if config.grouping == "label" else _single_groups(source)
    if config.objective == "cross_entropy" and config.grouping == "adversarial":
        _check_labels(groups, encoder, head)
    shape = encoder.input_shape if encoder and config.grouping == "adversarial" else _shape(config, source)
    layout = Layout(
        format=config.format,
        encoding=config.resolved_encoding,
        arrays=tuple(_arrays(config, shape, groups, encoder)),
        groups=len(groups),
        groups_per_shard=min(config.groups_per_shard, len(groups)),
    )
    per_shard = layout.groups_per_shard
    tasks = [
        ShardTask(shard, tuple(groups[shard * per_shard : (shard + 1) * per_shard])) for shard in range(layout.shards)
    ]
    return Plan(tasks, layout, _provenance(config, source, encoder, head, shape), shape)


def _single_groups(source: Source) -> list[Group]:
    return [Group(sample.key, (sample,), sample.label) for sample in source.samples]


def _label_groups(config: MergeConfig, source: Source) -> list[Group]:
    """Every class, or random runs of `members` of it."""
    classes: dict[int, list[Sample]] = {}
    for sample in source.samples:
        if sample.label is None:
            raise ConfigError(
                f"{source.url}: label groups need labels, {sample.name} has none; expected one sub-folder "
                "a class, or a Parquet label column (--label-column)"
            )
        classes.setdefault(sample.label, []).append(sample)
    groups = []
    for label in sorted(classes):
        samples = classes[label]
        size = config.group_size or len(samples)
        if size < len(samples):
            order = np.random.default_rng(np.random.SeedSequence([config.seed, label])).permutation(len(samples))
            samples = [samples[index] for index in order]
        for start in range(0, len(samples), size):
            key = f"class-{label:05d}-{start // size:06d}"
            groups.append(Group(key, tuple(samples[start : start + size]), label))
    return groups


def _check_labels(groups: Sequence[Group], encoder: Encoder | None, head: Head | None) -> None:
    classes = len(head.weight) if head else (encoder.embedding_dim if encoder else 0)
    for group in groups:
        if group.label is None:
            raise ConfigError(f"objective cross_entropy needs labels, {group.samples[0].name} has none")
        if not 0 <= group.label < classes:
            raise ConfigError(
                f"objective cross_entropy: {group.samples[0].name} has label {group.label}, expected one of the "
                f"{classes} classes of the head (--head)"
            )


def _shape(config: MergeConfig, source: Source) -> tuple[int, int, int]:
    """Pixels of label groups: as told, else as the first image that can be decoded."""
    if config.shape is not None:
        parts = config.shape.lower().split("x")
        if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts) or parts[0] not in "13":
            raise ConfigError(f"shape {config.shape!r}: expected CxHxW with C = 1 or 3, e.g. 3x224x224")
        return int(parts[0]), int(parts[1]), int(parts[2])
    for sample in source.samples:
        try:
            shape = native_shape(source.reader.read(sample))
            decode(source.reader.read(sample), shape)
        except (BadImage, OSError):
            continue
        return shape
    raise SourceError(f"{source.url}: expected images, found none that can be decoded")


def _arrays(
    config: MergeConfig, shape: tuple[int, int, int], groups: Sequence[Group], encoder: Encoder | None
) -> list[ArraySpec]:
    adversarial = config.grouping == "adversarial"
    largest = (config.group_size or 1) if adversarial else max(len(group.samples) for group in groups)
    if config.resolved_encoding == "float32":
        arrays = [ArraySpec.of(name, np.dtype(np.float32), shape) for name in ("mean", "mean_square")]
    else:
        radius = math.floor(config.pgd.epsilon * LEVELS)
        spread = min(LEVELS, 2 * radius) if adversarial else LEVELS
        arrays = [
            ArraySpec.of("sum", sum_dtype(largest), shape),
            ArraySpec.of("scatter", scatter_dtype(largest, spread), shape),
        ]
    if adversarial and encoder is not None:
        arrays.append(ArraySpec(name="target", dtype="float32", shape=(encoder.embedding_dim,)))
    if config.keep_members:
        arrays.append(ArraySpec(name="members", dtype="uint8", shape=(largest, *shape)))
    if config.keep_clean:
        arrays.append(ArraySpec(name="clean", dtype="uint8", shape=shape))
    return arrays


def _provenance(
    config: MergeConfig, source: Source, encoder: Encoder | None, head: Head | None, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What the groups are made from and how. `url` and `spec` say where things were; hashes say what they were."""
    provenance: dict[str, Any] = {
        "source": {
            "url": source.url,
            "kind": source.kind,
            "samples": len(source.samples),
            "fingerprint": source.fingerprint,
            "class_names": list(source.class_names),
        },
        "preprocessing": {"shape": list(shape), "resize": "bicubic, shorter side", "crop": "centre"},
        "grouping": {"kind": config.grouping, "members": config.group_size},
        "seed": config.seed,
        "numerics": {"batch_size": config.batch_size, "threads": config.threads, "dtype": "float32"},
        "versions": {name: version(name) for name in VERSIONED},
    }
    if config.grouping == "adversarial" and encoder is not None:
        provenance["encoder"] = {
            "spec": encoder.spec,
            "sha256": encoder.sha256,
            "random_weights": encoder.random_weights,
            "embedding_dim": encoder.embedding_dim,
        }
        provenance["attack"] = {
            "kind": "pgd",
            "norm": "linf",
            "objective": config.objective,
            "epsilon": config.epsilon,
            "step_size": config.step_size,
            "steps": config.steps,
            "random_start": config.random_start,
            "grid": config.grid,
        }
    if config.license is not None:
        provenance["license"] = config.license
    if head is not None:
        provenance["head"] = {"spec": config.head, "classes": len(head.weight)}
    return provenance
