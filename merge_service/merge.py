"""The merge: plan it, run the shards that are missing, finish the artifact."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import ModuleType

import torch

from datamerge.encoders import Encoder, Head, pick_device
from datamerge.encoders.runs import ResolvedEncoder
from datamerge.runtime import Progress
from datamerge.runtime.messages import warn
from datamerge.runtime.signals import sigterm_raises
from datamerge.sources import LISTING, Source, open_source
from datamerge.sources.labels import shown
from datamerge.sources.orientation import Exif
from datamerge.sources.sample import fingerprint
from merge_service import clustering
from merge_service.config import MergeConfig
from merge_service.continuing import as_begun, check_source
from merge_service.encoders import check_pair, named_encoder
from merge_service.failures import explain, is_hopeless
from merge_service.grouping import Group, by_class, clusters_of
from merge_service.heads import named_head, with_labels_of_head
from merge_service.planning import Plan, make_plan, pixels_of
from merge_service.turning import say_remarks, turning_of
from merge_service.work_queue import GivenUp
from merge_service.worker import Wanted, WorkerSetup
from merge_service.worker_memory import worker_memory
from storage_schemas import (
    ArtifactWriter,
    DatamergeError,
    Location,
    Manifest,
    Reject,
)
from storage_schemas.card.finish import finish
from storage_schemas.display import one_line
from storage_schemas.schema.manifest import HEAD
from storage_schemas.schema.preprocessing import Preprocessing

MIN_REJECTED = 10


@dataclass(frozen=True)
class MergeResult:
    """The result of a merge.

    Attributes:
        manifest: manifest of the finished artifact.
        merged_shards: number of shards that this run wrote; the others existed.
        rejects: samples that this run could not use.
        seconds: wall time of the work on Ray, in seconds.
        attack_seconds: seconds spent on attacks, or on embeddings without an attack, summed over workers.
    """

    manifest: Manifest
    merged_shards: int
    rejects: tuple[Reject, ...]
    seconds: float
    attack_seconds: float

    def __repr__(self) -> str:
        groups = (
            f"{self.manifest.groups} groups in {len(self.manifest.shards)} shards, {self.merged_shards} of them new"
        )
        return one_line(self, "", groups, f"{len(self.rejects)} rejects", f"{self.seconds:.1f} s")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A planned merge, not yet begun.

    Attributes:
        encoder, target_encoder: encoder to attack or embed with, and encoder of the targets; None where not needed.
        files: other files of the artifact, by name: class head, source listing, clusters.
    """

    config: MergeConfig
    source: Source
    plan: Plan
    encoder: ResolvedEncoder | None
    target_encoder: ResolvedEncoder | None
    head: Head | None
    files: Mapping[str, bytes]

    @property
    def encoders(self) -> list[Encoder]:
        """The encoders that a worker loads, the attacked one first."""
        return [found.encoder for found in (self.encoder, self.target_encoder) if found is not None]


def prepare(config: MergeConfig, *, planning_only: bool = False, ray: ExitStack | None = None) -> Prepared:
    """List the source, load the encoder once for its shape and hash, and plan the merge.

    Args:
        config: settings of the merge.
        planning_only: assign samples to clusters in turn instead of running k-means.
        ray: keeps Ray running for the merge, if k-means had to start it.

    Raises:
        UserError: the merge would fail later, for a reason that can be checked now.
    """
    config = as_begun(config)
    source = open_source(
        config.source,
        limit=config.limit,
        limit_first=config.limit_first,
        seed=config.seed,
        image_column=config.image_column,
        label_column=config.label_column,
        group_column=config.group_column,
        split=config.split,
    )
    check_source(config.artifact, source)
    encoder = named_encoder(config, "encoder") if config.needs_encoder else None
    target_encoder = named_encoder(config, "target_encoder")
    check_pair(encoder, target_encoder)
    of_pixels = target_encoder or encoder or named_encoder(config, "preprocessing_of")
    turning = turning_of(config, source)
    preprocessing = pixels_of(config, source, of_pixels.encoder if of_pixels else None, turning.exif)
    head = named_head(config, encoder)
    source = with_labels_of_head(config, source, encoder, head)
    files = {LISTING: source.listing_bytes()}
    clusters = None
    if config.grouping == "cluster":
        classes = by_class(source)
        counts = {label: clusters_of(config, len(places)) for label, places in classes.items()}
        if planning_only:
            clusters = {label: [i % counts[label] for i in range(len(classes[label]))] for label in classes}
        else:
            with ExitStack() as only_here:
                clusters, files[clustering.FILE] = _clusters(
                    config, source, encoder, preprocessing, turning.exif, counts, ray or only_here
                )
    plan = make_plan(config, source, encoder, target_encoder, head, preprocessing, turning, clusters)
    _warn_of(config, encoder)
    if head is not None:
        files[HEAD] = head.to_bytes()
    return Prepared(
        config=config,
        source=source,
        plan=plan,
        encoder=encoder,
        target_encoder=target_encoder,
        head=head,
        files=files,
    )


def _warn_of(config: MergeConfig, encoder: ResolvedEncoder | None) -> None:
    """Warn about settings that are allowed but rarely intended."""
    for lost in config.lost_levels():
        warn(lost)
    if encoder is not None and encoder.encoder.random_weights:
        warn(
            f"encoder {encoder.encoder.spec} has RANDOM weights, so its groups are only good for trials; "
            f"name weights as {encoder.encoder.spec}@FILE"
        )


def merge(config: MergeConfig) -> MergeResult:
    """Make an artifact, or continue one that an earlier run with the same settings began.

    Raises:
        UserError: see `prepare`; or the location holds something else.
        DatamergeError: too many samples were rejected, none was usable, or some shards failed repeatedly.
    """
    with ExitStack() as ray:
        return run(prepare(config, ray=ray))


def run(prepared: Prepared) -> MergeResult:
    """Carry out a prepared merge."""
    config, plan = prepared.config, prepared.plan
    device, _ = local_device(config), _ray_stage()  # may raise, so before anything is written
    writer = ArtifactWriter(Location(config.artifact), plan.layout, plan.provenance)
    try:
        writer.begin(prepared.files)
        committed = writer.committed()
        # Rejects of earlier runs count towards the limit.
        earlier = sum(writer.finish().shards.column("rejected")) if committed else 0
    except OSError as error:
        raise (explain(error, config.artifact) if is_hopeless(error) else error) from error
    _check_rejects(prepared, earlier, ())
    shards = [shard for shard in range(plan.layout.shards) if shard not in committed]
    started = time.monotonic()
    rejects: list[Reject] = []
    attack_seconds = 0.0
    if shards:
        rejects, attack_seconds = _run_stage(prepared, writer, shards, earlier, device)
    manifest = finish(writer, lambda manifest: _check_usable(manifest, writer.location.url))
    return MergeResult(manifest, len(shards), tuple(rejects), time.monotonic() - started, attack_seconds)


def _run_stage(
    prepared: Prepared, writer: ArtifactWriter, shards: Sequence[int], earlier: int, device: str
) -> tuple[list[Reject], float]:
    """Merge the shards on Ray; returns their rejects and the seconds of their attacks."""
    config, plan = prepared.config, prepared.plan
    rejects: list[Reject] = []
    given_up: list[GivenUp] = []
    remarks: Counter[str] = Counter()
    attack_seconds = 0.0
    done = plan.layout.groups - sum(plan.count(shard) for shard in shards)
    ray_stage = _ray_stage()
    try:
        # Ray sets a handler for SIGTERM when it starts; ours must replace it.
        with (
            ray_stage.on_ray(config),
            sigterm_raises(),
            Progress("merge", plan.layout.groups, "groups", done) as progress,
        ):
            setup = worker_setup(prepared, writer, ray_stage.device(config, device))
            memory = worker_memory(config, plan.layout, prepared.encoders, setup.device)
            for result in ray_stage.run_shards(plan, shards, setup, memory):
                if isinstance(result, GivenUp):
                    given_up.append(result)
                else:
                    rejects += result.rejects
                    remarks.update(result.remarks)
                    attack_seconds += result.attack_seconds
                progress.advance(plan.count(result.shard), _note(earlier + len(rejects), given_up))
                _check_rejects(prepared, earlier + len(rejects), rejects)
    except BaseException:
        # Record the committed shards in the manifest; a full disk must not hide the first error.
        try:
            writer.finish()
        except OSError:
            pass
        raise
    say_remarks(remarks, plan.samples(shards), prepared.source, plan.exif)
    if given_up:
        writer.finish()
        raise DatamergeError(_describe(given_up, plan, config))
    return rejects, attack_seconds


def worker_setup(prepared: Prepared, writer: ArtifactWriter, device: str) -> WorkerSetup:
    """Everything that a worker of this merge needs to start."""
    encoder, target = (
        None if found is None else Wanted.of(found.encoder) for found in (prepared.encoder, prepared.target_encoder)
    )
    return WorkerSetup(
        config=prepared.config,
        writer=writer,
        reader=prepared.source.reader,
        preprocessing=prepared.plan.preprocessing,
        exif=prepared.plan.exif,
        encoder=encoder,
        target_encoder=target,
        head=prepared.head,
        device=device,
    )


def local_device(config: MergeConfig) -> str:
    """The device on which encoders run.

    Raises:
        ConfigError: the settings require a GPU, and there is none.
    """
    if config.device == "cuda" and (config.ray_address is not None or torch.cuda.is_available()):
        # A cluster's nodes may have GPUs that this machine lacks. A local GPU is left to the workers: opening it here
        # takes half a gigabyte of its memory, or all of a GPU that admits one process.
        return "cuda"
    return pick_device(config.device).type


def _ray_stage() -> ModuleType:
    """Import the module that needs Ray, only when work runs: planning and estimates do without Ray.

    Raises:
        DatamergeError: Ray is not installed.
    """
    try:
        from merge_service import ray_stage
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "ray":
            raise
        raise DatamergeError("a merge runs on Ray, which is not installed: pip install 'datamerge[merge]'") from None
    return ray_stage


def _clusters(
    config: MergeConfig,
    source: Source,
    encoder: ResolvedEncoder | None,
    preprocessing: Preprocessing,
    exif: Exif,
    counts: Mapping[int, int],
    ray: ExitStack,
) -> tuple[dict[int, list[int]], bytes]:
    """Clusters of every class, and the file that stores them; read from the artifact if an earlier run wrote it."""
    identity = fingerprint(
        [source.fingerprint, len(source.samples), counts, config.cluster_by, config.seed, preprocessing.record()]
        + [encoder.encoder.sha256 if encoder else None, config.batch_size, config.threads]
        + ([encoder.encoder.code] if encoder and encoder.encoder.code else [])
        + ([exif] if exif == "transpose" else [])  # earlier releases clustered without EXIF
    )
    location = Location(config.artifact)
    if location.exists(clustering.FILE):
        data = location.read(clustering.FILE)
        known = clustering.from_bytes(data, identity)
        if known is not None:
            return known, data
    ray_stage, here, classes = _ray_stage(), local_device(config), by_class(source)
    found: dict[int, list[int]] = {}
    ray.enter_context(ray_stage.on_ray(config))
    ray.enter_context(sigterm_raises())
    with Progress("cluster", len(source.samples), "samples") as progress:
        setup = WorkerSetup(
            config=config,
            reader=source.reader,
            preprocessing=preprocessing,
            exif=exif,
            encoder=Wanted.of(encoder.encoder) if encoder else None,
            device=ray_stage.device(config, here),
        )
        for label, clusters in ray_stage.run_clusters(setup, source.samples, classes, counts):
            found[label] = clusters
            progress.advance(len(clusters))
    found = {label: found[label] for label in sorted(found)}
    return found, clustering.to_bytes(identity, found)


def _check_usable(manifest: Manifest, url: str) -> None:
    if manifest.groups == 0:
        raise DatamergeError(
            f"{url}: expected at least one usable group, found none; see `datamerge inspect {url}` for the reasons"
        )


def _note(rejected: int, given_up: Sequence[GivenUp]) -> str:
    notes = [f"{rejected} rejected"] if rejected else []
    notes += [f"{len(given_up)} shards failed"] if given_up else []
    return ", ".join(notes)


def _describe(given_up: Sequence[GivenUp], plan: Plan, config: MergeConfig) -> str:
    """One line about the failed shards: their samples, number of tries and reasons."""

    def names(groups: Sequence[Group]) -> str:
        return shown(sample.name for group in groups for sample in group.samples)

    def one_line(one: GivenUp) -> str:
        times = "once" if one.tries == 1 else f"{one.tries} times"
        return f"shard {one.shard:05d} ({names(plan.groups_of(one.shard))}) failed {times}: {one.reason}"

    reasons = [one_line(one) for one in sorted(given_up, key=lambda one: one.shard)[:5]]
    more = f"; and {len(given_up) - 5} more" if len(given_up) > 5 else ""
    return (
        f"{config.artifact}: {len(given_up)} of {plan.layout.shards} shards could not be made, the others are "
        f"finished: {'; '.join(reasons)}{more}. Remove the cause and run the same command again"
    )


def _check_rejects(prepared: Prepared, count: int, latest: Sequence[Reject]) -> None:
    config, samples = prepared.config, len(prepared.source.samples)
    allowed = config.max_rejected if config.max_rejected is not None else max(MIN_REJECTED, samples // 100)
    if count > allowed:
        last = f"the last: {latest[-1].sample}: {latest[-1].reason}" if latest else f"see {config.artifact}/commits"
        raise DatamergeError(
            f"{count} samples could not be used, more than the {allowed} allowed; {last}. Fix the source and merge "
            "again, or raise `max_rejected` and run again"
        )
