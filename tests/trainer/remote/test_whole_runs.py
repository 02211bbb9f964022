"""Whole runs on a remote artifact: killed and continued, and with a cache that is too small for it."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storage_schemas.access.block_file import BLOCK
from tests.support.servers import WebServer
from trainer import TrainConfig, train

FRESH = multiprocessing.get_context("forkserver")
# 32 KiB of sums and as much scatter per record: several blocks of the cache.
SHAPE, ENCODER = (1, 128, 128), "mlp:1x128x128-2-6"


def _train(artifact: str, run: Path, **settings: Any) -> None:
    shared: dict[str, Any] = {"batch_size": 3, "steps": 8, "learning_rate": 1e-2, "log_every": 1}
    train(TrainConfig(artifact=artifact, run=str(run), checkpoint_every=1, **{**shared, **settings}))


def _losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def _cached_blocks(cache: Path, url: str, files: list[str]) -> set[tuple[str, int]]:
    """Blocks of these files that are in the cache."""
    found = set()
    for path in files:
        for copy in cache.glob(hashlib.sha256(f"{url}/{path}".encode()).hexdigest() + "*"):
            data, whole = copy.read_bytes(), copy.suffix != ".blocks"
            size = len(data) if whole else int(copy.name.split(".")[1])
            marks = data[size:] or bytes([1]) * -(-size // BLOCK)
            found |= {(path, block) for block, mark in enumerate(marks) if mark}
    return found


def test_a_killed_run_continues_without_fetching_cached_blocks_again(
    tmp_path: Path, web: WebServer, make_artifact: Callable[..., str]
) -> None:
    """Losses are the same, and cached blocks are not fetched again."""
    local, url = make_artifact(name="web/a", shape=SHAPE, encoder=ENCODER), f"{web.url}/a"
    run, cache, go = tmp_path / "run", tmp_path / "cache", threading.Event()
    files = [path.relative_to(local).as_posix() for path in (Path(local) / "shards").iterdir()]
    _train(local, tmp_path / "local")
    asked: list[str] = []

    def hold(method: str, path: str) -> None:
        if "/shards/" in path:
            asked.append(path)
            if len(asked) > 6:
                go.wait(60)

    web.fault = hold
    FRESH.set_forkserver_preload(["trainer.run.job"])
    process = FRESH.Process(target=_train, args=(url, run), kwargs={"cache": str(cache)})
    process.start()
    while process.is_alive() and not (len(asked) > 6 and _cached_blocks(cache, url, files)):
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    go.set()
    had = _cached_blocks(cache, url, files)
    web.requests.clear()
    _train(url, run, cache=str(cache))
    assert _losses(run) == _losses(tmp_path / "local")
    again = set()
    for _, path, span in web.requests:
        if "/shards/" in path:
            first, last = map(int, span.removeprefix("bytes=").split("-"))
            again |= {(path.removeprefix("/a/"), block) for block in range(first // BLOCK, last // BLOCK + 1)}
    assert had
    assert again
    assert not had & again


@pytest.mark.parametrize("form", ["webdataset", "zarr"])
def test_a_cache_smaller_than_the_artifact_keeps_its_limit(
    tmp_path: Path,
    web: WebServer,
    make_artifact: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    form: str,
) -> None:
    """Losses are the same, with one warning and no more bytes on the disk than the limit."""
    local = make_artifact(name="web/a", shape=SHAPE, encoder=ENCODER, format=form)
    _train(local, tmp_path / "local")
    limit, cache = 40 * BLOCK, tmp_path / "cache"
    capsys.readouterr()
    _train(f"{web.url}/a", tmp_path / "run", cache=str(cache), cache_bytes=limit)
    assert _losses(tmp_path / "run") == _losses(tmp_path / "local")
    copies = [file.stat() for file in cache.iterdir() if len(file.name) >= 64]
    assert 0 < sum(min(copy.st_size, 512 * copy.st_blocks) for copy in copies) <= limit
    warnings = [line for line in capsys.readouterr().err.splitlines() if "cache_bytes: " in line]
    assert len(warnings) == 1
