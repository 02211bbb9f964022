"""Several artifacts of which some are remote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.servers import WebServer
from trainer import TrainConfig, train

FORMS = [("a", "webdataset", 3), ("b", "zarr", 11), ("c", "webdataset", 12)]


def _losses(artifacts: list[str], run: Path, **settings: Any) -> list[float]:
    shared: dict[str, Any] = {"epochs": 2, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    train(TrainConfig(artifact=artifacts, run=str(run), **shared, **settings))
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("cached", [True, False])
def test_the_place_changes_nothing(
    tmp_path: Path, web: WebServer, make_artifact: Callable[..., str], cached: bool
) -> None:
    local = [make_artifact(name=f"web/{name}", format=kind, seed=seed) for name, kind, seed in FORMS]
    texts = [local[0], f"{local[1]}=2", f"{local[2]}=0.5"]
    expected = _losses(texts, tmp_path / "local")
    cache = str(tmp_path / "cache") if cached else "none"
    remote = [f"{web.url}/a", f"{web.url}/b=2", texts[2]]
    assert _losses(remote, tmp_path / "remote", cache=cache) == expected
