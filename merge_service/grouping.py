"""Which samples become one record: a pure function of settings, source and, for clusters, their assignment."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from datamerge.sources import Sample, Source
from datamerge.sources.sample import make_keys
from merge_service.config import MergeConfig
from storage_schemas import ConfigError


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that become one record."""

    key: str
    samples: tuple[Sample, ...]
    label: int | None


def make_groups(config: MergeConfig, source: Source, clusters: Mapping[int, Sequence[int]] | None) -> list[Group]:
    """All groups of a merge, in the order that defines shards.

    Args:
        config: the settings.
        source: where the samples are.
        clusters: for cluster groups, by label, the cluster of each sample of `by_class`.

    Raises:
        ConfigError: samples without the label or column value that groups need.
    """
    if config.grouping == "adversarial":
        groups = [Group(sample.key, (sample,), sample.label) for sample in source.samples]
    elif config.grouping == "label":
        groups = _label_groups(config, source)
    elif config.grouping == "cluster":
        groups = _cluster_groups(by_class(source), clusters or {})
    else:
        groups = _column_groups(config, source)
    if config.resolved_targets != "embedding":
        _check_labels(groups, source)
    return groups


def by_class(source: Source) -> dict[int, list[Sample]]:
    """Samples by label, in the source's order.

    Raises:
        ConfigError: a sample has no label.
    """
    classes: dict[int, list[Sample]] = {}
    for sample in source.samples:
        if sample.label is None:
            raise ConfigError(
                f"label_column: groups inside classes need labels, {sample.name} of {source.url} has none"
                f"{source.why}; expected one sub-folder a class, a labels.csv, or a label column"
            )
        classes.setdefault(sample.label, []).append(sample)
    return {label: classes[label] for label in sorted(classes)}


def clusters_of(config: MergeConfig, samples: int) -> int:
    """Number of clusters of a class with this many samples."""
    wanted = config.clusters or round(samples / (config.members or samples))
    return max(1, min(wanted, samples))


def _label_groups(config: MergeConfig, source: Source) -> list[Group]:
    """Every class, or random runs of `members` of it."""
    groups = []
    for label, samples in by_class(source).items():
        size = config.group_size or len(samples)
        if size < len(samples):
            order = np.random.default_rng(np.random.SeedSequence([config.seed, label])).permutation(len(samples))
            samples = [samples[index] for index in order]
        for start in range(0, len(samples), size):
            key = f"class-{label:05d}-{start // size:06d}"
            groups.append(Group(key, tuple(samples[start : start + size]), label))
    return groups


def _cluster_groups(classes: Mapping[int, Sequence[Sample]], clusters: Mapping[int, Sequence[int]]) -> list[Group]:
    """The clusters of every class; empty ones have no group."""
    groups = []
    for label, samples in classes.items():
        members: dict[int, list[Sample]] = {}
        for sample, cluster in zip(samples, clusters[label], strict=True):
            members.setdefault(cluster, []).append(sample)
        for cluster in sorted(members):
            groups.append(Group(f"class-{label:05d}-cluster-{cluster:06d}", tuple(members[cluster]), label))
    return groups


def _column_groups(config: MergeConfig, source: Source) -> list[Group]:
    """Samples with the same value of a column, in the order of the values."""
    members: dict[str, list[Sample]] = {}
    for sample in source.samples:
        if sample.group is None:
            raise ConfigError(
                f"group_column: expected a value of {config.group_column!r} for every sample, {sample.name} of "
                f"{source.url} has none"
            )
        members.setdefault(sample.group, []).append(sample)
    values = sorted(members)
    groups = []
    # A dot in a value is no extension, and two values must not fall together.
    for key, value in zip(make_keys([f"{value}.group" for value in values]), values, strict=True):
        labels = {sample.label for sample in members[value]}
        label = labels.pop() if len(labels) == 1 else None
        if labels and config.resolved_targets != "embedding":
            raise ConfigError(
                f"group_column: expected one label in the group {value!r} of column {config.group_column!r} of "
                f'{source.url}, found several; group by another column, or add `targets="embedding"` and an `encoder`'
            )
        groups.append(Group(key, tuple(members[value]), label))
    return groups


def _check_labels(groups: Sequence[Group], source: Source) -> None:
    for group in groups:
        if group.label is None:
            raise ConfigError(
                f"targets: label targets need labels, {group.samples[0].name} has none{source.why}; expected one "
                'sub-folder a class, a labels.csv or a `label_column`, or use `targets="embedding"`'
            )


def assignment_sha256(groups: Sequence[Group]) -> str:
    """Hash of which sample is in which group."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update("\0".join((group.key, *(sample.key for sample in group.samples), "\n")).encode())
    return digest.hexdigest()
