"""Which samples form a group: a pure function of the settings, the source and the assignment to clusters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import overload

import numpy as np
import numpy.typing as npt

from datamerge.sources import Sample, Source
from datamerge.sources.columns import NO_LABEL, Samples, optional_labels
from datamerge.sources.naming import CHUNK, Indices
from datamerge.sources.sample import make_keys
from merge_service.config import MergeConfig
from storage_schemas import ConfigError

Places = npt.NDArray[np.int64]
"""Indices of samples in their source."""


@dataclass(frozen=True, slots=True)
class Group:
    """Samples that become one record."""

    key: str
    samples: tuple[Sample, ...]
    label: int | None


@dataclass(frozen=True, eq=False)
class Groups(Sequence[Group]):
    """A sequence of groups, stored as columns; each `Group` is made on access.

    Attributes:
        samples: the samples of the source.
        labels: int32 [G], `NO_LABEL` for none.
        key: gives the key of a group from its index.
        members: int64, indices of the groups' samples, group after group; None if each sample is a group.
        starts: int64 [G + 1], where each group begins in `members`; None if each sample is a group.
        order: int64, indices of the selected groups in their order; None for all G in order.
    """

    samples: Samples
    labels: npt.NDArray[np.int32]
    key: Callable[[int], str]
    members: Places | None = None
    starts: Places | None = None
    order: Places | None = None

    @classmethod
    def of_each(cls, samples: Samples) -> Groups:
        """A group for each sample, with its key and label."""
        return cls(samples, samples.labels, lambda index: samples[index].key)

    def __len__(self) -> int:
        return len(self.labels if self.order is None else self.order)

    @overload
    def __getitem__(self, index: int) -> Group: ...

    @overload
    def __getitem__(self, index: slice) -> Groups: ...

    def __getitem__(self, index: int | slice) -> Group | Groups:
        if isinstance(index, slice):
            return self.take(np.arange(*index.indices(len(self))))
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"group {index} of {len(self)}")
        (group,) = self._made(place, place + 1)
        return group

    def __iter__(self) -> Iterator[Group]:
        ends, start = np.cumsum(self.sizes()), 0
        while start < len(self):
            done = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
            yield from self._made(start, stop)
            start = stop

    def take(self, places: Indices) -> Groups:
        """The groups at these places, in this order."""
        return replace(self, order=np.asarray(places) if self.order is None else self.order[places])

    def sizes(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int64]:
        """Number of samples of each group in [start, stop)."""
        chosen = self._chosen(start, len(self) if stop is None else stop)
        return (
            np.ones(len(chosen), np.int64) if self.starts is None else self.starts[chosen + 1] - self.starts[chosen]
        )

    def outline(self, start: int, stop: int) -> tuple[Group, ...]:
        """The groups in [start, stop), without their samples."""
        chosen = self._chosen(start, stop)
        labels = optional_labels(self.labels[chosen])
        return tuple(Group(self.key(g), (), label) for g, label in zip(chosen.tolist(), labels, strict=True))

    def places(self, start: int, stop: int) -> Places:
        """Indices in the source of the samples of the groups in [start, stop), group after group."""
        chosen = self._chosen(start, stop)
        if self.members is None or self.starts is None:
            return chosen
        ranges = zip(self.starts[chosen].tolist(), self.starts[chosen + 1].tolist(), strict=True)
        return np.concatenate([self.members[begin:end] for begin, end in ranges] or [np.empty(0, np.int64)])

    def _chosen(self, start: int, stop: int) -> Places:
        return np.arange(start, stop) if self.order is None else self.order[start:stop]

    def _made(self, start: int, stop: int) -> Iterator[Group]:
        samples = iter(self.samples.take(self.places(start, stop)))
        if self.starts is None:
            return (Group(sample.key, (sample,), sample.label) for sample in samples)
        outline = self.outline(start, stop)
        sizes = self.sizes(start, stop).tolist()
        return (
            replace(group, samples=tuple(islice(samples, size))) for group, size in zip(outline, sizes, strict=True)
        )


def make_groups(config: MergeConfig, source: Source, clusters: Mapping[int, Sequence[int]] | None) -> Groups:
    """All groups of a merge, in the order that defines shards.

    Args:
        config: settings of the merge.
        source: source of the samples.
        clusters: for cluster groups: by label, the cluster of each sample in the order of `by_class`.

    Raises:
        ConfigError: a sample has no label or column value, and its group needs one.
    """
    if config.grouping == "adversarial":
        groups = Groups.of_each(source.samples)
    elif config.grouping == "label":
        groups = _label_groups(config, source)
    elif config.grouping == "cluster":
        groups = _cluster_groups(source, clusters or {})
    else:
        groups = _column_groups(config, source)
    if config.resolved_targets != "embedding":
        _check_labels(groups, source)
    return groups


def by_class(source: Source) -> dict[int, Places]:
    """Indices of the samples of each label, in the source's order.

    Raises:
        ConfigError: a sample has no label.
    """
    labels = source.samples.labels
    missing = labels == NO_LABEL
    if missing.any():
        raise ConfigError(
            f"label_column: groups inside classes need labels, {source.samples[int(missing.argmax())].name} of "
            f"{source.url} has none{source.why}; add one sub-folder per class, a labels.csv, or a label column"
        )
    present, counts = np.unique(labels, return_counts=True)
    runs = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    return dict(zip(present.tolist(), runs, strict=True))


def clusters_of(config: MergeConfig, samples: int) -> int:
    """Number of clusters of a class with this many samples."""
    wanted = config.clusters or round(samples / (config.members or samples))
    return max(1, min(wanted, samples))


@dataclass(frozen=True, eq=False)
class _Keys:
    """Keys of groups inside classes.

    Attributes:
        form: format string of label and number.
        labels, numbers: label, and number within the class, of each of the G groups.
    """

    form: str
    labels: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int32]

    def __call__(self, index: int) -> str:
        return self.form.format(self.labels[index], self.numbers[index])


def _inside_classes(samples: Samples, form: str, cut: Iterable[tuple[int, Places, Places, Places]]) -> Groups:
    """Groups of (label, members, sizes, numbers) of each class."""
    of_class, members, sizes, numbers = zip(*cut, strict=True)
    labels = np.repeat(np.array(of_class, np.int32), [len(some) for some in sizes])
    keys = _Keys(form, labels, np.concatenate(numbers).astype(np.int32))
    return Groups(samples, labels, keys, np.concatenate(members), _starts(np.concatenate(sizes)))


def _starts(sizes: npt.NDArray[np.int64]) -> Places:
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def _label_groups(config: MergeConfig, source: Source) -> Groups:
    """Whole classes, or each class cut at random into groups of `members`."""

    def cut() -> Iterator[tuple[int, Places, Places, Places]]:
        for label, places in by_class(source).items():
            size = config.group_size or len(places)
            if size < len(places):
                generator = np.random.default_rng(np.random.SeedSequence([config.seed, label]))
                places = places[generator.permutation(len(places))]
            numbers = np.arange(-(-len(places) // size))
            yield label, places, np.minimum(size, len(places) - numbers * size), numbers

    return _inside_classes(source.samples, "class-{:05d}-{:06d}", cut())


def _cluster_groups(source: Source, clusters: Mapping[int, Sequence[int]]) -> Groups:
    """One group per non-empty cluster of each class."""

    def cut() -> Iterator[tuple[int, Places, Places, Places]]:
        for label, places in by_class(source).items():
            found = np.asarray(clusters[label])
            numbers, sizes = np.unique(found, return_counts=True)
            yield label, places[np.argsort(found, kind="stable")], sizes, numbers

    return _inside_classes(source.samples, "class-{:05d}-cluster-{:06d}", cut())


def _column_groups(config: MergeConfig, source: Source) -> Groups:
    """One group per value of a column, ordered by value."""
    samples, values = source.samples, source.samples.groups
    if values is None or (values.codes < 0).any():
        first = 0 if values is None else int((values.codes < 0).argmax())
        raise ConfigError(
            f"group_column: expected a value of {config.group_column!r} for every sample, {samples[first].name} of "
            f"{source.url} has none; add it, or use another column"
        )
    counts = np.bincount(values.codes, minlength=len(values.distinct))
    # Ordered by value; values without samples (a limit may have dropped them) come last.
    ranked = sorted(range(len(counts)), key=lambda code: (not counts[code], values.distinct[code]))
    used = ranked[: np.count_nonzero(counts)]
    rank = np.empty(len(counts), np.int32)
    rank[ranked] = np.arange(len(counts))
    members = np.argsort(rank[values.codes], kind="stable")
    starts = _starts(counts[used])
    sorted_labels = samples.labels[members]
    labels, others = (reduce.reduceat(sorted_labels, starts[:-1]) for reduce in (np.minimum, np.maximum))
    mixed = labels != others
    if mixed.any() and config.resolved_targets != "embedding":
        raise ConfigError(
            f"group_column: expected one label in the group {values.distinct[used[int(mixed.argmax())]]!r} of column "
            f"{config.group_column!r} of {source.url}, found several; group by another column, or add "
            '`targets="embedding"` and an `encoder`'
        )
    # `make_keys` drops what looks like an extension; the suffix keeps values such as 1.0 and 1.5 apart.
    keys = make_keys([f"{values.distinct[code]}.group" for code in used])
    return Groups(samples, np.where(mixed, np.int32(NO_LABEL), labels), keys.__getitem__, members, starts)


def _check_labels(groups: Groups, source: Source) -> None:
    missing = groups.labels == NO_LABEL
    if missing.any():
        raise ConfigError(
            f"targets: label targets need labels, {groups[int(missing.argmax())].samples[0].name} has none"
            f"{source.why}; add one sub-folder per class, a labels.csv or a `label_column`, or use "
            '`targets="embedding"`'
        )


def assignment_sha256(groups: Sequence[Group]) -> str:
    """Hash of the assignment of samples to groups."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update("\0".join((group.key, *(sample.key for sample in group.samples), "\n")).encode())
    return digest.hexdigest()
