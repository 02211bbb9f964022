"""Processes of one machine, as torchrun starts them, which read a remote artifact through one cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.access.block_file import BLOCK
from tests.support.ranks import launch
from tests.support.servers import WebServer
from trainer import TrainConfig, train

# 32 KiB of sums and as much scatter per record: several blocks of the cache.
SHAPE, ENCODER = (1, 128, 128), "mlp:1x128x128-2-6"


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_processes_fetch_every_block_once(tmp_path: Path, web: WebServer, make_artifact: Callable[..., str]) -> None:
    """For a tar artifact and a Zarr one; the losses are those of one process."""
    cache, entries, references = tmp_path / "cache", [], []
    files: dict[str, int] = {}
    for form in ("webdataset", "zarr"):
        local = make_artifact(name=f"web/{form}", format=form, shape=SHAPE, encoder=ENCODER)
        settings: dict[str, Any] = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "log_every": 1, "threads": 1}
        references.append(tmp_path / f"one-{form}")
        train(TrainConfig(artifact=local, run=str(references[-1]), **settings))
        entries.append(
            {"artifact": f"{web.url}/{form}", "run": str(tmp_path / form), "cache": str(cache), **settings}
        )
        files |= {f"/{path.relative_to(tmp_path / 'web')}": path.stat().st_size for path in Path(local).rglob("*")}
    outcomes = launch(2, entries, tmp_path)
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert all("RECORDS" in text and "ERROR" not in text for _, text in outcomes), outcomes
    for entry, run in zip(entries, references, strict=True):
        assert _losses(Path(entry["run"])) == pytest.approx(_losses(run), rel=1e-5)
    blocks: Counter[tuple[str, int]] = Counter()
    for _, path, span in (one for one in web.requests if one[0] == "GET"):
        first, _, last = (span or f"bytes=0-{files[path] - 1}").removeprefix("bytes=").partition("-")
        blocks.update((path, block) for block in range(int(first) // BLOCK, int(last) // BLOCK + 1))
    twice = {path for (path, _), count in blocks.items() if count > 1}
    # Each process checks whether the manifest has changed.
    assert twice == {"/webdataset/manifest.json", "/zarr/manifest.json"}
    assert len({path for path, _ in blocks if "/shards/" in path or "/c/" in path}) >= 6
