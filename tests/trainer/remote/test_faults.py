"""Training from a faulty server: the same losses bit for bit with few more requests, or a one-line error."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from benchmarks.remote_server import Remote, Request, running
from benchmarks.streaming import twice
from storage_schemas import DatamergeError
from storage_schemas.access import request_threads
from trainer import TrainConfig, train

# 32 KiB of sums and as much scatter per record: several requests per batch.
SHAPE = (1, 128, 128)
TROUBLES: dict[str, dict[str, float]] = {
    "slow": {"latency": 0.01, "rate": 2e6},
    "5 % fail": {"fail": 0.05},
    "slower and failing": {"latency": 0.005, "total": 2e6, "fail": 0.1},
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    """A server for all temporary folders, in another process."""
    with running(tmp_path_factory.getbasetemp()) as remote:
        yield remote


@pytest.fixture
def remote(server: Remote, monkeypatch: pytest.MonkeyPatch) -> Remote:
    """The server without faults, which also serves as S3."""
    for name, value in (("ACCESS_KEY_ID", "KEY"), ("SECRET_ACCESS_KEY", "SECRET"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.set(latency=0, rate=0, total=0, fail=0, stall=0, stalls=0)
    server.log()
    return server


def _losses(artifact: str, run: Path, **settings: Any) -> list[float]:
    shared: dict[str, Any] = {"batch_size": 3, "steps": 8, "learning_rate": 1e-2, "log_every": 1}
    train(TrainConfig(artifact=artifact, run=str(run), **{**shared, **settings}))
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def _url(remote: Remote, artifact: str, tmp_path_factory: pytest.TempPathFactory, protocol: str = "http") -> str:
    path = Path(artifact).relative_to(tmp_path_factory.getbasetemp()).as_posix()
    return f"{remote.url}/{path}" if protocol == "http" else f"s3://{path}"


def _data(log: list[Request]) -> list[Request]:
    return [one for one in log if "/shards/" in one.path or "/c/" in one.path]


def _shards(artifact: Path) -> list[dict[str, int]]:
    """Sizes in bytes of the files of each shard, by path."""
    documents = [json.loads(path.read_bytes()) for path in (artifact / "commits").iterdir()]
    return [{file["path"]: file["bytes"] for file in document["files"]} for document in documents]


@pytest.mark.parametrize(
    ("trouble", "protocol", "cached"),
    [
        ("slow", "http", True),
        ("5 % fail", "http", False),
        ("5 % fail", "s3", True),
        ("slower and failing", "http", True),
        ("slower and failing", "s3", False),
    ],
)
def test_a_slow_or_failing_server_changes_no_loss(
    tmp_path: Path,
    remote: Remote,
    make_artifact: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    trouble: str,
    protocol: str,
    cached: bool,
) -> None:
    artifact = make_artifact(shape=SHAPE, encoder="mlp:1x128x128-2-6", format="zarr" if cached else "webdataset")
    url = _url(remote, artifact, tmp_path_factory, protocol)
    expected = _losses(artifact, tmp_path / "local")
    well, ill = (str(tmp_path / name) if cached else "none" for name in ("well", "ill"))
    assert _losses(url, tmp_path / "well-run", cache=well) == expected
    usual = remote.log()[0]
    remote.set(**TROUBLES[trouble])
    assert _losses(url, tmp_path / "ill-run", cache=ill) == expected
    log = remote.log()[0]
    failed = sum(one.status == 503 for one in log)
    # Failed requests are repeated, also those that were joined from several.
    assert len(log) <= len(usual) + 3 * failed + 8
    answered = [one for one in log if one.status != 503]
    # Without a cache a record may be requested in every epoch, or less often if its next use is announced in time.
    epochs = 1 if cached else 8 * 3 / 10
    assert sum(one.end - one.start for one in answered) <= 1.1 * epochs * sum(one.end - one.start for one in usual)


@pytest.mark.parametrize("cached", [True, False])
def test_stalled_answers_give_a_warning_and_change_no_loss(
    tmp_path: Path,
    remote: Remote,
    make_artifact: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
) -> None:
    monkeypatch.setattr(request_threads, "SILENT_SECONDS", 0.25)
    artifact = make_artifact(shape=SHAPE, encoder="mlp:1x128x128-2-6")
    expected = _losses(artifact, tmp_path / "local")
    remote.set(stall=1.5, stalls=12)
    with pytest.warns(RuntimeWarning, match="nothing has come for"):
        found = _losses(
            _url(remote, artifact, tmp_path_factory),
            tmp_path / "remote",
            cache=str(tmp_path / "cache") if cached else "none",
        )
    assert found == expected
    assert twice(_data(remote.log()[0])) == 0 or not cached


@pytest.mark.parametrize("cached", [True, False])
def test_a_server_that_slows_down_changes_no_loss(
    tmp_path: Path,
    remote: Remote,
    make_artifact: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    cached: bool,
) -> None:
    """After the first step its rate is halved."""
    artifact = make_artifact(shape=SHAPE, encoder="mlp:1x128x128-2-6")
    shared = {"batch_size": 1, "steps": 10}
    expected = _losses(artifact, tmp_path / "local", **shared)
    lines, done = tmp_path / "run" / "log.jsonl", []

    def change() -> None:
        while not lines.exists() or not (count := lines.read_bytes().count(b"\n")):
            time.sleep(0.002)
        remote.set(total=5e5)
        done.append(count)

    remote.set(total=1e6)
    thread = threading.Thread(target=change, daemon=True)
    thread.start()
    cache = str(tmp_path / "cache") if cached else "none"
    assert _losses(_url(remote, artifact, tmp_path_factory), tmp_path / "run", cache=cache, **shared) == expected
    thread.join()
    assert done[0] < 5


def test_a_server_that_always_fails_ends_the_run_with_one_line(
    tmp_path: Path,
    remote: Remote,
    make_artifact: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    quick: list[float],
) -> None:
    """The cache keeps what it has: the same command continues and requests nothing twice."""
    artifact = make_artifact(shape=SHAPE, encoder="mlp:1x128x128-2-6")
    url, cache = _url(remote, artifact, tmp_path_factory), str(tmp_path / "cache")
    expected = _losses(artifact, tmp_path / "local")
    train(TrainConfig(artifact=url, run=str(tmp_path / "run"), batch_size=3, steps=1, cache=cache))
    had = remote.log()[0]
    remote.set(fail=1)
    with pytest.raises(DatamergeError) as caught:
        _losses(url, tmp_path / "remote", cache=cache)
    assert "\n" not in str(caught.value)
    assert url in str(caught.value)
    assert "503" in str(caught.value)
    assert len(remote.log()[0]) <= 30
    remote.set(fail=0)
    assert _losses(url, tmp_path / "remote", cache=cache) == expected
    assert twice(_data([*had, *remote.log()[0]])) == 0


@pytest.mark.parametrize("form", ["webdataset", "zarr"])
def test_only_the_shard_of_a_damaged_cache_file_is_fetched_again(
    tmp_path: Path,
    remote: Remote,
    make_artifact: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
    form: str,
) -> None:
    artifact = make_artifact(shape=SHAPE, encoder="mlp:1x128x128-2-6", format=form)
    url, cache = _url(remote, artifact, tmp_path_factory), tmp_path / "cache"
    expected = _losses(artifact, tmp_path / "local")
    assert _losses(url, tmp_path / "first", cache=str(cache)) == expected
    copy = max((path for path in cache.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with copy.open("r+b") as file:
        file.seek(copy.stat().st_size // 2)
        file.write(bytes(5000))
    remote.log()
    assert _losses(url, tmp_path / "again", cache=str(cache)) == expected
    log = _data(remote.log()[0])
    asked = {one.path.partition("/artifact/")[2] for one in log}
    [files] = [files for files in _shards(Path(artifact)) if asked & files.keys()]
    assert asked <= files.keys()
    assert 0 < sum(one.end - one.start for one in log) <= sum(files.values())
