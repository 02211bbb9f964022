"""Merges in this process, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from merge_service import MergeConfig
from merge_service.merge import prepare, worker_setup
from merge_service.worker import ShardWorker
from storage_schemas import Artifact, ArtifactWriter, Location, open_artifact


def merge_alone(photos: Path, artifact: Path, **settings: Any) -> Artifact:
    """Merge photos with one worker, in this process."""
    attack = {"steps": 3} if settings.get("grouping", "adversarial") == "adversarial" else {}
    config = MergeConfig.model_validate(
        {"source": str(photos), "artifact": str(artifact), "members": 2, "device": "cpu"} | attack | settings
    )
    return merge_here(config)


def merge_here(config: MergeConfig) -> Artifact:
    """Run a merge without Ray: shards one after the other, in this process."""
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    threads = torch.get_num_threads()
    worker.prepare()
    for shard in range(prepared.plan.layout.shards):
        worker.run(prepared.plan.task(shard))
    torch.set_num_threads(threads)
    writer.finish()
    return open_artifact(config.artifact)
