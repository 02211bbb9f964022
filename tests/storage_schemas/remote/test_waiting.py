"""Threads and locks while a server does not answer: nothing spins, and no file waits for another."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage_schemas import Cache, Location
from storage_schemas.access.fetching import Fetcher
from storage_schemas.access.folder import Folder
from storage_schemas.access.pieces import Range
from storage_schemas.access.room import locked
from tests.support.servers import WebServer

SIZE, FILES = 40_000, 48


@pytest.fixture
def fetcher(tmp_path: Path, web: WebServer) -> Iterator[Fetcher]:
    for number in range(FILES):
        (tmp_path / "web" / f"{number}").write_bytes(bytes(SIZE))
    fetcher = Fetcher(Location(web.url), Cache(tmp_path / "cache", 10**9))
    yield fetcher
    fetcher.close()


def test_filling_does_not_spin_while_the_server_is_silent(
    web: WebServer, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, claims, claim = threading.Event(), 0, Folder.claim

    def counted(*arguments: object) -> object:
        nonlocal claims
        claims += 1
        return claim(*arguments)  # type: ignore[arg-type]  # passed on as they came

    monkeypatch.setattr(Folder, "claim", counted)
    web.fault = lambda method, path: None if go.wait(20) else 500
    paths = [str(number) for number in range(8)]
    fetcher.fill([Range(path, 0, SIZE) for path in paths], dict.fromkeys(paths, SIZE))
    time.sleep(0.5)
    assert claims <= 10 * len(paths)
    go.set()
    for path in paths:
        assert len(fetcher.read(path, 0, SIZE, SIZE)) == SIZE


def test_a_forgotten_copy_is_filled_again(web: WebServer, fetcher: Fetcher) -> None:
    fetcher.fill([Range("0", 0, SIZE), Range("1", 0, SIZE)], {"0": SIZE, "1": SIZE})
    _wait_until_filled(fetcher)
    fetcher.read("1", 5, 50, SIZE)
    assert fetcher.is_filled
    web.requests.clear()
    assert fetcher.forget("1")
    assert fetcher.read("1", 5, 50, SIZE).tobytes() == bytes(45)
    _wait_until_filled(fetcher)
    asked = [span.removeprefix("bytes=").split("-") for _, path, span in web.requests if path == "/1"]
    assert sum(int(last) + 1 - int(first) for first, last in asked) == SIZE


def test_a_server_without_ranges_is_filled_too(web: WebServer, fetcher: Fetcher) -> None:
    web.ranges = False
    fetcher.fill([Range("0", 0, 10_000), Range("0", 20_000, SIZE)], {"0": SIZE})
    _wait_until_filled(fetcher)
    assert fetcher.read("0", 30_000, SIZE, SIZE).tobytes() == bytes(10_000)


def _wait_until_filled(fetcher: Fetcher) -> None:
    end = time.monotonic() + 20
    while not fetcher.is_filled:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_files_of_unknown_size_do_not_wait_for_each_other(tmp_path: Path, web: WebServer, fetcher: Fetcher) -> None:
    """The server answers no request before all have arrived."""
    together = threading.Barrier(FILES, timeout=60)
    web.fault = lambda method, path: 500 if together.wait() < 0 else None
    with ThreadPoolExecutor(FILES) as pool:
        found = list(pool.map(fetcher.read_file, [str(number) for number in range(FILES)]))
    assert found == [bytes(SIZE)] * FILES
    assert len(web.requests) == FILES
    assert not list((tmp_path / "cache").rglob("lock-" + 64 * "?"))


def test_a_lock_that_is_removed_after_use_excludes(tmp_path: Path) -> None:
    inside, most, guard = 0, 0, threading.Lock()

    def enter(_: int) -> None:
        nonlocal inside, most
        with locked(tmp_path / "lock", keep=False):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0)
            with guard:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(enter, range(2000)))
    assert most == 1
    assert list(tmp_path.iterdir()) == []
