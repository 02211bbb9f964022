"""Before any work: which groups, in which shards, stored how. A pure function of settings, source and encoder."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, TypeVar

import numpy as np

from datamerge.attacks import PGD
from datamerge.encoders import Encoder, Head, weights_sha256
from datamerge.encoders.runs import ResolvedEncoder
from datamerge.runtime.messages import say
from datamerge.sources import BadImage, Sample, Source, decode, native_shape
from datamerge.sources.orientation import Exif
from merge_service.config import MergeConfig
from merge_service.dealing import Dealing, dealt
from merge_service.grouping import Group, Groups, Places, assignment_sha256, make_groups
from merge_service.turning import Turning
from merge_service.work_queue import Piece
from storage_schemas import ArraySpec, ConfigError, Layout, SourceError
from storage_schemas.schema.exact import pixel_spread
from storage_schemas.schema.factors import factor_spec
from storage_schemas.schema.preprocessing import Preprocessing
from storage_schemas.schema.provenance import own_version
from storage_schemas.schema.record import moment_specs

# Bytes depend on these, as on our own code: decoding, resizing and arithmetic.
VERSIONED = ("numpy", "pillow", "torch")
# A shard of given samples is cut into parts of this many, which different workers add up.
PART_SAMPLES = 4096

T = TypeVar("T")

Items = tuple[tuple[int, int, Sample], ...]
"""Samples of a shard in the source's order: (index of the group, position in the group, sample)."""
_Sorted = tuple[Places, Places, Places]
"""The same as columns, with the places of the samples in the source."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One unit of work: the groups of one shard.

    Attributes:
        groups: without their samples where these are added up as items.
        items: all its samples, if they are added up and few enough for one piece.
        reading: places of the groups in the order in which their images are read; empty for theirs.
    """

    shard: int
    groups: tuple[Group, ...]
    items: Items = ()
    reading: tuple[int, ...] = ()

    def as_read(self) -> list[Sample]:
        """The sample of each group, as they are read."""
        return [self.groups[place].samples[0] for place in self.reading or range(len(self.groups))]

    def in_place(self, read: Sequence[T]) -> list[T]:
        """What was made of these samples, group by group."""
        found = dict(zip(self.reading or range(len(self.groups)), read, strict=True))
        return [found[place] for place in range(len(self.groups))]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a merge will write, known before the first shard.

    Attributes:
        groups: in the order that defines shards.
        preprocessing: which pixels are made of the images.
        exif: whether EXIF turns them.
        in_parts: whether a shard's samples may be added up on several workers.
        dealing: of groups that are a sample each, where they are not in the source's order.
    """

    groups: Groups
    layout: Layout
    provenance: dict[str, Any]
    preprocessing: Preprocessing
    exif: Exif
    in_parts: bool
    dealing: Dealing | None = None
    _sorted: dict[int, _Sorted] = field(default_factory=dict)

    def groups_of(self, shard: int) -> tuple[Group, ...]:
        """The groups of a shard."""
        return tuple(self.groups[slice(*self._span(shard))])

    def count(self, shard: int) -> int:
        """How many groups a shard has."""
        first, last = self._span(shard)
        return last - first

    def samples(self, shards: Iterable[int]) -> int:
        """How many samples shards have."""
        return sum(int(self.groups.sizes(*self._span(shard)).sum()) for shard in shards)

    def task(self, shard: int) -> ShardTask:
        """A shard as a worker gets it."""
        if not self.in_parts:
            return self._task(shard, *self._span(shard))
        outline = self.groups.outline(*self._span(shard))
        return ShardTask(shard, outline, self.part(shard, 0) if self.parts(shard) == 1 else ())

    def beginning(self, groups: int) -> ShardTask:
        """The first groups, as a shard of their own."""
        return self._task(0, 0, groups)

    def parts(self, shard: int) -> int:
        """Parts that the samples of a shard are cut into; 1 for a shard that is done in one go."""
        if not self.in_parts:
            return 1
        return max(1, -(-self.samples([shard]) // PART_SAMPLES))

    def part(self, shard: int, part: int) -> Items:
        """Part of a shard: a run of its samples in the source's order, so that files are read from front to back."""
        if shard not in self._sorted:
            self._sorted.clear()  # one shard's list is enough: its parts are handed out one after the other
            self._sorted[shard] = self._in_order(shard)
        group, position, place = (
            column[part * PART_SAMPLES : (part + 1) * PART_SAMPLES] for column in self._sorted[shard]
        )
        return tuple(zip(group.tolist(), position.tolist(), self.groups.samples.take(place), strict=True))

    def pieces(self, shards: Sequence[int]) -> Iterator[Piece]:
        """The pieces of work that these shards begin with."""
        for shard in shards:
            parts = self.parts(shard)
            if parts == 1:
                yield Piece(shard)
            else:
                yield from (Piece(shard, part) for part in range(parts))

    def _task(self, shard: int, start: int, stop: int) -> ShardTask:
        reading = () if self.dealing is None else tuple(self.dealing.as_read(start, stop).tolist())
        return ShardTask(shard, tuple(self.groups[start:stop]), reading=reading)

    def _span(self, shard: int) -> tuple[int, int]:
        first = shard * self.layout.groups_per_shard
        return first, min(first + self.layout.groups_per_shard, self.layout.groups)

    def _in_order(self, shard: int) -> _Sorted:
        sizes, places = self.groups.sizes(*self._span(shard)), self.groups.places(*self._span(shard))
        group = np.repeat(np.arange(len(sizes)), sizes)
        position = np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        order = np.argsort(places)
        return group[order], position[order], places[order]


def make_plan(
    config: MergeConfig,
    source: Source,
    encoder: ResolvedEncoder | None,
    target_encoder: ResolvedEncoder | None,
    head: Head | None,
    preprocessing: Preprocessing,
    turning: Turning,
    clusters: Mapping[int, Sequence[int]] | None = None,
) -> Plan:
    """Plan groups, shards, arrays and provenance.

    Raises:
        ConfigError, SourceError: settings that do not go with the data.
    """
    groups = make_groups(config, source, clusters)
    loaded = (target_encoder or encoder) if config.needs_encoder else None
    if config.objective == "cross_entropy" and config.attacks:
        _check_classes(groups, encoder.encoder if encoder else None, head, source)
    provenance = _provenance(config, source, encoder, target_encoder, head, preprocessing)
    provenance["source"] |= turning.record
    arrays = _arrays(
        config, preprocessing.shape, groups, loaded.encoder if loaded else None, pixel_spread(provenance)
    )
    layout = Layout(
        format=config.format,
        encoding=config.resolved_encoding,
        arrays=tuple(arrays),
        groups=len(groups),
        groups_per_shard=min(config.groups_per_shard, len(groups)),
    )
    if config.grouping == "cluster":
        provenance["grouping"]["assignment_sha256"] = assignment_sha256(groups)
    dealing, kept = None, groups
    if config.order == "shuffled":
        groups, dealing = dealt(groups, source.blocks, layout.groups_per_shard, config.seed)
        if groups is kept:
            say(f"order: {source.url}: groups stay as they are; shards would read more row groups in another order")
            del provenance["order"]
    return Plan(
        groups=groups,
        layout=layout,
        provenance=provenance,
        preprocessing=preprocessing,
        exif=turning.exif,
        in_parts=config.grouping != "adversarial",
        dealing=dealing,
    )


def _check_classes(groups: Groups, encoder: Encoder | None, head: Head | None, source: Source) -> None:
    classes = len(head.weight) if head else (encoder.embedding_dim if encoder else 0)
    unfit = (groups.labels < 0) | (groups.labels >= classes)
    if not unfit.any():
        return
    group = groups[int(unfit.argmax())]
    if group.label is None:
        raise ConfigError(
            f"objective: cross_entropy needs labels, {group.samples[0].name} has none{source.why}; give it one, "
            'or use `objective="squared_error"`'
        )
    raise ConfigError(
        f"objective: cross_entropy expects labels of the {classes} classes of the head, "
        f"{group.samples[0].name} has label {group.label}; use another `head`"
    )


def pixels_of(config: MergeConfig, source: Source, encoder: Encoder | None, exif: Exif) -> Preprocessing:
    """The pixels that an encoder takes, or those of the settings where none says.

    Raises:
        ConfigError, SourceError: no pixels of images, or none to be found.
    """
    preprocessing = Preprocessing(shape=_shape(config, source, exif)) if encoder is None else encoder.preprocessing
    if preprocessing.shape[0] not in (1, 3):
        raise ConfigError(
            f"encoder: expected 1 or 3 channels, those that images have, found pixels {preprocessing.shape}; choose "
            "another encoder"
        )
    return preprocessing if config.resize else preprocessing.of_exact_size()


def _shape(config: MergeConfig, source: Source, exif: Exif) -> tuple[int, int, int]:
    """Of the pixels where no encoder says: from the settings, else of the first image that can be decoded."""
    if config.shape is not None:
        if not re.fullmatch(r"[13](x[1-9][0-9]{0,4}){2}", config.shape.lower()):
            raise ConfigError(f"shape: expected CxHxW with C = 1 or 3, e.g. 3x224x224, found {config.shape!r}")
        channels, height, width = map(int, config.shape.lower().split("x"))
        return channels, height, width
    for sample in source.samples:
        try:
            data = source.reader.read(sample)
            shape = native_shape(data, exif)
            decode(data, Preprocessing(shape=shape, resize="none"), exif)
        except (BadImage, OSError):
            continue
        return shape
    raise SourceError(f"{source.url}: expected images, found none that can be decoded")


def _arrays(
    config: MergeConfig, shape: tuple[int, int, int], groups: Groups, encoder: Encoder | None, spread: int
) -> list[ArraySpec]:
    """The arrays of a record; `spread`: largest difference of two members of a group, in grey levels."""
    largest = (config.group_size or 1) if config.grouping == "adversarial" else int(groups.sizes().max())
    arrays = moment_specs(config.resolved_encoding, shape, largest, spread)
    if config.stores_embedding and encoder is not None:
        arrays.append(ArraySpec(name="target", dtype="float32", shape=(encoder.embedding_dim,)))
    if config.factors is not None:
        arrays.append(factor_spec(config.factors, largest, spread, shape))
    if config.keep_members:
        arrays.append(ArraySpec(name="members", dtype="uint8", shape=(largest, *shape)))
    if config.keep_clean:
        arrays.append(ArraySpec(name="clean", dtype="uint8", shape=shape))
    return arrays


def _provenance(
    config: MergeConfig,
    source: Source,
    encoder: ResolvedEncoder | None,
    target_encoder: ResolvedEncoder | None,
    head: Head | None,
    preprocessing: Preprocessing,
) -> dict[str, Any]:
    """What the groups are made from and how. `url` and `spec` say where things were; hashes say what they were."""
    provenance: dict[str, Any] = {
        "source": {
            "url": source.url,
            "kind": source.kind,
            "samples": len(source.samples),
            **({"drawn_from": source.drawn_from} if source.drawn_from is not None else {}),
            "fingerprint": source.fingerprint,
            "class_names": list(source.class_names),
        },
        "preprocessing": preprocessing.record(),
        "grouping": _grouping(config),
        "targets": config.resolved_targets,
        "seed": config.seed,
        **({"order": config.order} if config.order != "source" else {}),  # plans of 0.1.0 say nothing of theirs
        "numerics": {
            "batch_size": config.batch_size,
            "threads": config.threads,
            "dtype": config.precision,
            "compiled": config.compile,
        },
        "versions": {"datamerge": own_version(), **{name: version(name) for name in VERSIONED}},
    }
    if config.needs_encoder and encoder is not None:
        provenance["encoder"] = (target_encoder or encoder).provenance()
        if target_encoder is not None:
            # The record above is that of the targets' encoder; this one may normalise otherwise.
            own = encoder.encoder.preprocessing.record()
            provenance["attacked_encoder"] = {**encoder.provenance(), "preprocessing": own}
    if config.grouping == "adversarial":
        # None says that the mean is the clean image; artifacts of other groupings say nothing.
        provenance["attack"] = _attack(config) if config.attacks else None
    if config.license is not None:
        provenance["license"] = config.license
    if head is not None:
        provenance["head"] = {
            "spec": config.head,
            "classes": len(head.weight),
            # Not `sha256`: combine has that of the whole file under `head.sha256`.
            "weights_sha256": weights_sha256(head),
            "names_sha256": hashlib.sha256(json.dumps(head.names).encode()).hexdigest(),
        }
    return provenance


def _grouping(config: MergeConfig) -> dict[str, Any]:
    grouping: dict[str, Any] = {"kind": config.grouping, "members": config.group_size}
    if config.grouping == "cluster":
        grouping |= {"clusters": config.clusters, "space": config.cluster_by}
    if config.grouping == "column":
        grouping |= {"column": config.group_column}
    if config.factors is not None:
        grouping |= {"factors": config.factor_kind}
    return grouping


def _attack(config: MergeConfig) -> dict[str, Any]:
    settings = config.attack_settings
    start_radius = config.epsilon if config.start_radius is None else config.start_radius
    return {
        "kind": config.attack,
        "norm": "linf",
        "objective": config.objective,
        "epsilon": str(config.epsilon),
        **({"step_size": str(config.step_size)} if isinstance(settings, PGD) else {}),
        "steps": config.steps,
        "random_start": config.random_start,
        **({"start_radius": str(start_radius)} if config.random_start else {}),
        "restarts": config.restarts,
        "grid": config.grid,
    }
