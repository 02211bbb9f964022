"""Requests and checks before the first step of a run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from storage_schemas import ConfigError, open_artifact
from tests.support.refusals import refused
from tests.support.servers import WebServer
from trainer import TrainConfig
from trainer.run.job import make_job


def test_labels_of_many_shards_are_requested_concurrently(
    tmp_path: Path, web: WebServer, make_artifact: Callable[..., str]
) -> None:
    """The server answers no sidecar before all three are requested."""
    make_artifact(name="web/a", targets=False, labels=True)
    shards = len(open_artifact(tmp_path / "web" / "a").shard_sizes)
    together = threading.Barrier(shards, timeout=60)

    def wait(method: str, path: str) -> int | None:
        if "/commits/" in path:
            together.wait()
        return None

    web.fault = wait
    make_job(TrainConfig(artifact=f"{web.url}/a", run=str(tmp_path / "run"), steps=1))
    assert len([path for path in web.fetched() if "/commits/" in path]) == shards


def test_a_label_without_a_class_is_refused_before_the_first_step(
    tmp_path: Path, make_artifact: Callable[..., str]
) -> None:
    artifact = make_artifact(targets=False, labels=True, width=3, encoder="mlp:1x4x4-8-3")
    with refused(ConfigError, "loss", "label 3", "k3"):
        make_job(TrainConfig(artifact=artifact, run=str(tmp_path / "run"), steps=1))
