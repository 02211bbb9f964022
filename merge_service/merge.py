"""The merge: plan, find what is missing, do it, finish the artifact."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from adversarial import Encoder, Head, load_encoder, load_head
from console import Progress
from merge_service import ray_stage
from merge_service.config import MergeConfig
from merge_service.planning import Plan, make_plan
from merge_service.work import WorkerSetup
from sources import Source, open_source
from storage_schemas import ArtifactWriter, ConfigError, DatamergeError, Location, Manifest, Reject, open_artifact
from storage_schemas.manifest import HEAD
from storage_schemas.presentation import presentation_files

MIN_REJECTED = 10


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        manifest: of the finished artifact.
        merged_shards: shards that this run wrote; the others were there.
        rejects: samples this run could not use.
        seconds: wall time of the Ray stage.
        attack_seconds: summed over workers.
    """

    manifest: Manifest
    merged_shards: int
    rejects: tuple[Reject, ...]
    seconds: float
    attack_seconds: float


@dataclass(frozen=True)
class Prepared:
    """A merge that has been planned and not begun."""

    config: MergeConfig
    source: Source
    plan: Plan
    encoder_sha256: str | None
    head: Head | None


def prepare(config: MergeConfig) -> Prepared:
    """List the source, load the encoder once to learn its shape and hash, plan.

    Raises:
        UserError: anything that would make the merge fail later and can be known now.
    """
    source = open_source(
        config.source, limit=config.limit, image_column=config.image_column, label_column=config.label_column
    )
    encoder = load_encoder(config.encoder) if config.encoder and config.grouping == "adversarial" else None
    head = _load_head(config, encoder)
    plan = make_plan(config, source, encoder, head)
    if encoder is not None and encoder.random_weights:
        sys.stderr.write(
            f"warning: encoder {encoder.spec} has RANDOM weights, its groups are good for trying things out only; "
            f"name weights as {encoder.spec}@FILE\n"
        )
    return Prepared(config, source, plan, encoder.sha256 if encoder else None, head)


def merge(config: MergeConfig) -> MergeResult:
    """Make an artifact, or finish one that an earlier run of the same settings began.

    Raises:
        UserError: see `prepare`; or the location holds something else.
        DatamergeError: too many samples had to be rejected, or none could be used.
    """
    return run(prepare(config))


def run(prepared: Prepared) -> MergeResult:
    """Carry out a prepared merge."""
    config, plan = prepared.config, prepared.plan
    writer = ArtifactWriter(Location(config.artifact), plan.layout, plan.provenance)
    writer.begin({} if prepared.head is None else {HEAD: prepared.head.to_bytes()})
    committed = writer.committed()
    tasks = [task for task in plan.tasks if task.shard not in committed]
    started = time.monotonic()
    rejects: list[Reject] = []
    attack_seconds = 0.0
    if tasks:
        device = _device(config)
        setup = WorkerSetup(
            config, writer, prepared.source.reader, plan.shape, prepared.encoder_sha256, prepared.head, device
        )
        ray_stage.start(config.ray_address, config.workers, config.threads)
        workers = ray_stage.worker_count(config.workers, config.threads, device == "cuda", len(tasks))
        left = sum(len(task.groups) for task in tasks)
        try:
            with Progress("merge", plan.layout.groups, "groups", plan.layout.groups - left) as progress:
                for result in ray_stage.run_shards(tasks, setup, workers, device == "cuda"):
                    rejects += result.rejects
                    attack_seconds += result.attack_seconds
                    progress.advance(
                        len(plan.tasks[result.shard].groups), f"{len(rejects)} rejected" if rejects else ""
                    )
                    _check_rejects(config, rejects, len(prepared.source.samples))
        except BaseException:
            # What is committed stays; say so in the manifest before anything else is said.
            writer.finish()
            raise
        finally:
            ray_stage.stop()
    manifest = _complete(writer)
    return MergeResult(manifest, len(tasks), tuple(rejects), time.monotonic() - started, attack_seconds)


def _complete(writer: ArtifactWriter) -> Manifest:
    manifest = writer.finish()
    if manifest.groups == 0:
        raise DatamergeError(
            f"{writer.location.url}: expected at least one usable group, found none; "
            f"see `datamerge inspect {writer.location.url}` for the reasons"
        )
    return writer.finish(presentation_files(open_artifact(writer.location)))


def _check_rejects(config: MergeConfig, rejects: list[Reject], samples: int) -> None:
    allowed = config.max_rejected if config.max_rejected is not None else max(MIN_REJECTED, samples // 100)
    if len(rejects) > allowed:
        last = rejects[-1]
        raise DatamergeError(
            f"{len(rejects)} samples could not be used, more than the {allowed} allowed; the last: {last.sample}: "
            f"{last.reason}. Mend the source, or raise --max-rejected and run again"
        )


def _device(config: MergeConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def _load_head(config: MergeConfig, encoder: Encoder | None) -> Head | None:
    if config.head is None:
        return None
    names: list[str] = []
    if config.class_names is not None:
        try:
            names = Path(config.class_names).read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise ConfigError(f"class_names: {config.class_names}: {error.strerror}") from None
    head = load_head(config.head, [name.strip() for name in names if name.strip()])
    if encoder is not None:
        head.check_width(encoder.embedding_dim, f"head {config.head!r}")
    return head
