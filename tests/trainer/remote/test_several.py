"""Several artifacts of which some are remote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.remote_server import running
from storage_schemas.access.fetching import REQUESTS
from tests.support.servers import WebServer
from trainer import TrainConfig, train

FORMS = [("a", "webdataset", 3), ("b", "zarr", 11), ("c", "webdataset", 12)]


def _losses(artifacts: list[str], run: Path, **settings: Any) -> list[float]:
    shared: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    train(TrainConfig(artifact=artifacts, run=str(run), **{**shared, **settings}))
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cached", [True, False])
def test_remote_artifacts_give_the_losses_of_local_ones(
    tmp_path: Path, web: WebServer, make_artifact: Callable[..., str], cached: bool
) -> None:
    local = [make_artifact(name=f"web/{name}", format=kind, seed=seed) for name, kind, seed in FORMS]
    texts = [local[0], f"{local[1]}=2", f"{local[2]}=0.5"]
    expected = _losses(texts, tmp_path / "local")
    cache = str(tmp_path / "cache") if cached else "none"
    remote = [f"{web.url}/a", f"{web.url}/b=2", texts[2]]
    assert _losses(remote, tmp_path / "remote", cache=cache) == expected


def test_concurrent_requests_are_bounded_per_artifact(tmp_path: Path, make_artifact: Callable[..., str]) -> None:
    """The server is so slow that many requests are under way at a time."""
    names = ("a", "b")
    for seed, name in enumerate(names):
        make_artifact(name=name, format="zarr", seed=seed, shape=(1, 128, 128), encoder="mlp:1x128x128-2-6")
    with running(tmp_path, latency=0.1) as server:
        _losses([f"{server.url}/{name}" for name in names], tmp_path / "run", cache="none", epochs=1)
        log, _ = server.log()
    for name in names:
        requests = [one for one in log if one.path.startswith(f"/{name}/")]
        most = max(sum(one.began <= other.began < one.ended for one in requests) for other in requests)
        assert 8 < most <= REQUESTS
