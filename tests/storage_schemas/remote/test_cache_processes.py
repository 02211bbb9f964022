"""A cache folder that several processes share, some of which die, and one that an older release left."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from storage_schemas import Cache, Location
from storage_schemas.access.block_file import BLOCK
from storage_schemas.access.cache import CachedLocation
from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.access.fetching import Fetcher
from storage_schemas.access.folder import Folder
from storage_schemas.access.pieces import Range
from storage_schemas.access.room import ABANDONED, Room
from tests.support.servers import WebServer

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = 50 * BLOCK + 7
PLENTY = 10**9
TWO_FILES = 2 * SIZE + 1000  # with their marks
# These processes inherit no threads from this one, and need not import everything again.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload([__name__])


@pytest.fixture
def contents(tmp_path: Path) -> dict[str, bytes]:
    """Files of two artifacts, with the same names in both."""
    rng = np.random.default_rng(0)
    contents = {f"{artifact}/{name}": rng.bytes(SIZE) for artifact in ("one", "two") for name in "abc"}
    for path, data in contents.items():
        Location(tmp_path / "web").write(path, data)
    return contents


def _block_requests(web: WebServer) -> Counter[tuple[str, int]]:
    """Number of requests for each block of each file."""
    asked: Counter[tuple[str, int]] = Counter()
    for _, path, span in web.requests:
        first, last = span.removeprefix("bytes=").split("-")
        asked.update((path[1:], block) for block in range(int(first) // BLOCK, int(last) // BLOCK + 1))
    return asked


def _results_of(count: int, target: Callable[..., None], url: str, folder: Path) -> Iterator[Any]:
    """Yield the results of `count` processes that start together; each gets a different seed."""
    barrier, results = FRESH.Barrier(count), FRESH.Queue()
    processes = [FRESH.Process(target=target, args=(url, folder, seed, barrier, results)) for seed in range(count)]
    for process in processes:
        process.start()
    for _ in processes:
        yield results.get(timeout=120)
    for process in processes:
        process.join()


def _read_all(url: str, folder: Path, seed: int, barrier: Any, results: Any) -> None:
    """Read both artifacts part by part, in an order that depends on the seed, while the cache is filled."""
    rng = np.random.default_rng(seed)
    cache = Cache(folder, PLENTY)
    fetchers = {name: Fetcher(Location(f"{url}/{name}"), cache) for name in ("one", "two")}
    barrier.wait()
    for name in rng.permutation(["one", "two"]):
        fetchers[name].fill(
            [Range(path, 0, SIZE) for path in rng.permutation(list("abc"))], dict.fromkeys("abc", SIZE)
        )
    digests = {}
    for path in rng.permutation(["one/a", "one/b", "one/c", "two/a", "two/b", "two/c"]).tolist():
        artifact, name = path.split("/")
        parts = [fetchers[artifact].read(name, start, start + 9999, SIZE) for start in range(0, SIZE, 9999)]
        digests[path] = hashlib.sha256(np.concatenate(parts).tobytes()).hexdigest()
    for fetcher in fetchers.values():
        fetcher.close()
    results.put(digests)


def test_eight_processes_and_two_artifacts_fetch_every_byte_once(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    expected = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    for found in _results_of(8, _read_all, web.url, tmp_path / "cache"):
        assert found == expected
    assert _block_requests(web) == dict.fromkeys(((path, block) for path in contents for block in range(51)), 1)
    kept = [path for path in (tmp_path / "cache").iterdir() if len(path.name) == 64]
    assert sorted(path.read_bytes() for path in kept) == sorted(contents.values())


def _read_twice(url: str, folder: Path, seed: int, barrier: Any, results: Any) -> None:
    """Read the blocks of three files for two epochs, in an announced order that depends on the seed."""
    rng = np.random.default_rng(seed)
    blocks = [Range(path, start, start + BLOCK) for path in "abc" for start in range(0, SIZE - BLOCK, BLOCK)]
    order = [blocks[at] for _ in range(2) for at in rng.permutation(len(blocks))]
    fetcher = Fetcher(Location(f"{url}/one"), Cache(folder, SIZE))
    barrier.wait()
    fetcher.expect(order, dict.fromkeys("abc", SIZE))
    parts = {}
    for path, start, end in order:
        parts[path, start, end] = hashlib.sha256(fetcher.read(path, start, end, SIZE).tobytes()).hexdigest()
    fetcher.close()
    results.put((parts, fetcher.held))


def test_requests_are_bounded_when_processes_share_a_cache_that_is_too_small(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    count = 0
    for parts, held in _results_of(3, _read_twice, web.url, tmp_path / "cache"):
        count = len(parts)
        for (path, start, end), digest in parts.items():
            assert digest == hashlib.sha256(contents[f"one/{path}"][start:end]).hexdigest()
        assert held == 0
    # Each process reads every block twice, and with memory alone would fetch it once. How many copies are evicted
    # before others have read them depends on the speed of the processes.
    assert len(web.requests) <= 4 * count
    assert _block_requests(web).total() <= 4 * count


def _read_one(url: str, folder: Path, path: str, start: int, end: int) -> None:
    fetcher = Fetcher(Location(url), Cache(folder, PLENTY))
    fetcher.expect([], {})  # so that it fetches no more than it reads
    fetcher.read(path, start, end, SIZE)


def test_only_blocks_that_a_killed_process_was_fetching_are_fetched_again(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    folder, go, asked = tmp_path / "cache", threading.Event(), threading.Event()
    process = FRESH.Process(target=_read_one, args=(web.url, folder, "one/a", 0, 10 * BLOCK))
    process.start()
    process.join()

    def stall(method: str, path: str) -> None:
        if not asked.is_set():
            asked.set()
            go.wait(60)

    web.fault = stall
    killed = FRESH.Process(target=_read_one, args=(web.url, folder, "one/a", 20 * BLOCK, 30 * BLOCK))
    killed.start()
    assert asked.wait(60)
    other = Fetcher(Location(web.url), Cache(folder, PLENTY))
    other.fill([Range("one/a", 0, SIZE)], {"one/a": SIZE})
    while len(web.requests) < 4:  # all the rest, on both sides of the blocks that the other process is fetching
        time.sleep(0.01)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert other.read("one/a", 0, SIZE, SIZE).tobytes() == contents["one/a"]
    go.set()
    other.close()
    twice = {("one/a", block) for block in range(20, 30)}
    assert {place for place, times in _block_requests(web).items() if times == 2} == twice
    assert set(_block_requests(web).values()) == {1, 2}


def _use(url: str, folder: Path, used: Any, done: Any) -> None:
    part = Fetcher(Location(url), Cache(folder, TWO_FILES)).read("one/a", 0, 100, SIZE)
    used.set()
    done.wait(60)
    del part


def test_a_file_that_another_process_uses_is_not_evicted(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    used, done = FRESH.Event(), FRESH.Event()
    process = FRESH.Process(target=_use, args=(web.url, tmp_path / "cache", used, done))
    process.start()
    assert used.wait(60)
    location = CachedLocation.of(Location(web.url), Cache(tmp_path / "cache", TWO_FILES))
    for path in ("one/b", "one/c", "two/a"):
        assert fetcher_of(location).read(path, 0, SIZE, SIZE).tobytes() == contents[path]
    web.requests.clear()
    assert fetcher_of(location).read("one/a", 0, SIZE, SIZE).tobytes() == contents["one/a"]
    assert web.requests == []
    done.set()
    process.join()
    for path in ("two/b", "two/c"):
        fetcher_of(location).read(path, 0, SIZE, SIZE)
    fetcher_of(location).read("one/a", 0, SIZE, SIZE)
    assert _block_requests(web)["one/a", 0] == 1


def _evict(folder: Path, begun: Any, done: Any) -> None:
    """Evict continuously, in a cache whose limit is always exceeded."""
    room = Room(folder, 10, lambda name: True)
    begun.set()
    while not done.is_set():
        room._make_room(10, None)


def test_a_new_copy_is_not_evicted_before_it_is_open(tmp_path: Path) -> None:
    folder, begun, done = Folder(tmp_path, PLENTY), FRESH.Event(), FRESH.Event()
    used = folder.open("f" * 64, SIZE)
    used.write(0, [bytes(SIZE)])
    process = FRESH.Process(target=_evict, args=(tmp_path, begun, done))
    process.start()
    assert begun.wait(60)
    made: list[int] = []
    while process.is_alive() and len(made) < 2000:
        file = folder.open(f"{len(made):064x}", SIZE)
        made.append(file.inode)
        folder._open.clear()
    done.set()
    process.join()
    assert len(made) == 2000
    left = {path.name for path in tmp_path.iterdir()}
    assert f"{'f' * 64}.{SIZE}.blocks" in left
    assert len(left) < 2000  # the others were evicted meanwhile


def test_only_the_damaged_file_is_fetched_again(tmp_path: Path, web: WebServer, contents: dict[str, bytes]) -> None:
    location = CachedLocation.of(Location(web.url), Cache(tmp_path / "cache", PLENTY))
    for path, data in contents.items():
        assert location.read(path) == data
    name = hashlib.sha256(f"{web.url}/two/b".encode()).hexdigest()
    with (tmp_path / "cache" / name).open("r+b") as stream:
        stream.seek(SIZE // 2)
        stream.write(b"damage")
    assert location.read("two/b") != contents["two/b"]
    web.requests.clear()
    assert location.forget(["two/b"])
    for path, data in contents.items():
        assert location.read(path) == data
    assert {path for _, path, _ in web.requests} == {"/two/b"}
    assert not location.forget(["nothing"])


def test_a_copy_that_another_process_has_replaced_is_kept(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    """Both processes have read a damaged copy, and both drop it."""
    first, second = (CachedLocation.of(Location(web.url), Cache(tmp_path / "cache", PLENTY)) for _ in range(2))
    read = [fetcher_of(location).read("one/a", 0, SIZE, SIZE) for location in (first, second)]
    web.requests.clear()
    for location in (first, second):
        location.forget(["one/a"])
        assert location.read("one/a") == contents["one/a"]
    assert len(web.fetched()) == 1
    assert read[0].tobytes() == contents["one/a"]


@pytest.mark.parametrize("age", [0, 2 * ABANDONED])
def test_the_cache_of_an_older_release_is_used(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes], age: float
) -> None:
    """Whole copies are used; unfinished ones count towards the limit until they are old; locks never count."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / hashlib.sha256(f"{web.url}/one/a".encode()).hexdigest()).write_bytes(contents["one/a"])
    part = folder / f"{'e' * 64}.{SIZE}.part"
    part.write_bytes(b"half")
    os.utime(part, (time.time() - age, time.time() - age))
    (folder / "lock-07").write_bytes(bytes(SIZE))
    location = CachedLocation.of(Location(web.url), Cache(folder, TWO_FILES))
    assert location.read("one/a") == contents["one/a"]
    assert web.requests == []
    fetcher_of(location).read("one/b", 0, SIZE, SIZE)
    fetcher_of(location).read("one/a", 0, SIZE, SIZE)
    is_kept = not any(path == "/one/a" for _, path, _ in web.requests)
    assert (part.exists(), is_kept) == ((True, False) if not age else (False, True))


def test_space_granted_to_a_killed_process_is_released(tmp_path: Path, web: WebServer) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / f"grant-{'0' * 12}").write_bytes(b"%020d" % 90)
    with Folder(folder, 100).room.reserved(50) as may_write:
        assert may_write
    assert len(list(folder.glob("grant-*"))) == 1


def test_locks_of_killed_processes_are_removed_and_held_ones_are_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    left, held = (folder / f"lock-{letter * 64}" for letter in "ab")
    folder.mkdir()
    left.touch()
    with Folder(folder, 100).alone(held.name.removeprefix("lock-")), Folder(folder, 100).room.reserved(50):
        assert (left.exists(), held.exists()) == (False, True)
    assert not held.exists()


def test_a_copy_completed_by_a_killed_process_is_used(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    """The process died after it marked the last block and before it renamed the file."""
    folder = tmp_path / "cache"
    Cache(folder, PLENTY)
    name = hashlib.sha256(f"{web.url}/one/a".encode()).hexdigest()
    (folder / f"{name}.{SIZE}.blocks").write_bytes(contents["one/a"] + bytes([1]) * 51)
    location = CachedLocation.of(Location(web.url), Cache(folder, PLENTY))
    assert fetcher_of(location).read("one/a", 0, SIZE, SIZE).tobytes() == contents["one/a"]
    assert (folder / name).read_bytes() == contents["one/a"]
    assert web.requests == []


def test_a_cache_removed_while_in_use_is_filled_again(
    tmp_path: Path, web: WebServer, contents: dict[str, bytes]
) -> None:
    location = CachedLocation.of(Location(web.url), Cache(tmp_path / "cache", PLENTY))
    for _ in range(2):
        for path, data in contents.items():
            assert fetcher_of(location).read(path, 0, SIZE, SIZE).tobytes() == data
        for file in (tmp_path / "cache").iterdir():
            file.unlink()
    assert set(_block_requests(web).values()) == {2}
