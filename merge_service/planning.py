"""Plans groups, shards, arrays and provenance: a pure function of the settings, the source and the encoders."""

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

# Packages whose decoding, resizing and arithmetic the stored bytes depend on.
VERSIONED = ("numpy", "pillow", "torch")
# Number of given samples in a part of a shard; different workers may add up the parts.
PART_SAMPLES = 4096

T = TypeVar("T")

Items = tuple[tuple[int, int, Sample], ...]
"""Samples of a shard in the source's order: (index of the group, position in the group, sample)."""
_Sorted = tuple[Places, Places, Places]
"""The same as columns, with the samples' indices in the source."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One unit of work: the groups of one shard.

    Attributes:
        shard: index of the shard.
        groups: groups of the shard; without their samples if those are added up in parts.
        items: samples to add up, if they are few enough for one part; else empty.
        reading: indices of the groups in the order in which to read their images; empty for the order of the groups.
    """

    shard: int
    groups: tuple[Group, ...]
    items: Items = ()
    reading: tuple[int, ...] = ()

    def as_read(self) -> list[Sample]:
        """The one sample of each group, in the order in which to read them."""
        return [self.groups[place].samples[0] for place in self.reading or range(len(self.groups))]

    def in_place(self, read: Sequence[T]) -> list[T]:
        """Put results for `as_read` back into the order of the groups."""
        found = dict(zip(self.reading or range(len(self.groups)), read, strict=True))
        return [found[place] for place in range(len(self.groups))]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a merge will write, known before the first shard.

    Attributes:
        groups: groups in the order that defines shards.
        layout: layout of the artifact.
        provenance: provenance of the artifact.
        preprocessing: preprocessing of the images.
        exif: whether EXIF orientations are applied.
        in_parts: whether a shard's samples may be added up on several workers.
        dealing: shuffled order of groups of one sample each; None if there is none.
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
        """Number of groups in a shard."""
        first, last = self._span(shard)
        return last - first

    def samples(self, shards: Iterable[int]) -> int:
        """Number of samples in the shards."""
        return sum(int(self.groups.sizes(*self._span(shard)).sum()) for shard in shards)

    def task(self, shard: int) -> ShardTask:
        """The task of merging one shard."""
        if not self.in_parts:
            return self._task(shard, *self._span(shard))
        outline = self.groups.outline(*self._span(shard))
        return ShardTask(shard, outline, self.part(shard, 0) if self.parts(shard) == 1 else ())

    def beginning(self, groups: int) -> ShardTask:
        """A task of the first groups only."""
        return self._task(0, 0, groups)

    def parts(self, shard: int) -> int:
        """Number of parts of a shard; 1 if it is merged whole."""
        if not self.in_parts:
            return 1
        return max(1, -(-self.samples([shard]) // PART_SAMPLES))

    def part(self, shard: int, part: int) -> Items:
        """One part of a shard: a run of its samples in the source's order, so that files are read front to back."""
        if shard not in self._sorted:
            self._sorted.clear()  # one shard's list is enough, as its parts are requested in a row
            self._sorted[shard] = self._in_order(shard)
        group, position, place = (
            column[part * PART_SAMPLES : (part + 1) * PART_SAMPLES] for column in self._sorted[shard]
        )
        return tuple(zip(group.tolist(), position.tolist(), self.groups.samples.take(place), strict=True))

    def pieces(self, shards: Sequence[int]) -> Iterator[Piece]:
        """The first pieces of work of these shards: the shards, or all their parts."""
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
        ConfigError, SourceError: the settings do not fit the data.
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
            say(f"order: {source.url}: groups keep the source's order; shards would read more row groups otherwise")
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
    """Preprocessing of the encoder, or with the shape from the settings if there is no encoder.

    Raises:
        ConfigError: the shape is not that of images.
        SourceError: no image can be decoded to take the shape from.
    """
    preprocessing = Preprocessing(shape=_shape(config, source, exif)) if encoder is None else encoder.preprocessing
    if preprocessing.shape[0] not in (1, 3):
        raise ConfigError(
            f"encoder: expected 1 or 3 channels, as images have, found pixels {preprocessing.shape}; choose "
            "another encoder"
        )
    return preprocessing if config.resize else preprocessing.of_exact_size()


def _shape(config: MergeConfig, source: Source, exif: Exif) -> tuple[int, int, int]:
    """Shape [C, H, W] from the settings, else from the first image that can be decoded."""
    if config.shape is not None:
        if not re.fullmatch(r"[13](x[1-9][0-9]{0,4}){2}", config.shape.lower()):
            raise ConfigError(
                f"shape: expected CxHxW with C = 1 or 3, e.g. 3x224x224, found {config.shape!r}; correct it"
            )
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
    """Specs of a record's arrays; `spread` is the largest difference of two members of a group, in levels."""
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
    """How the groups are made. `url` and `spec` record locations, hashes record content."""
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
        **({"order": config.order} if config.order != "source" else {}),  # absent in plans of 0.1.0
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
            # `preprocessing` above is that of the target encoder; the attacked one may normalise differently.
            record = encoder.encoder.preprocessing.record()
            provenance["attacked_encoder"] = {**encoder.provenance(), "preprocessing": record}
    if config.grouping == "adversarial":
        # None means that the mean is the clean image; other groupings have no such entry.
        provenance["attack"] = _attack(config) if config.attacks else None
    if config.license is not None:
        provenance["license"] = config.license
    if head is not None:
        provenance["head"] = {
            "spec": config.head,
            "classes": len(head.weight),
            # Not `sha256`: combine stores the hash of the whole file under `head.sha256`.
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
