"""Prefetching: its order, its bounds, and its behaviour when the server fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest

from storage_schemas import Cache, CorruptShard, DatamergeError, Location
from storage_schemas.access import request_threads
from storage_schemas.access.block_file import BLOCK
from storage_schemas.access.copying import LARGEST
from storage_schemas.access.fetching import GAP, Fetcher
from storage_schemas.access.fills import SMALLEST
from storage_schemas.access.pieces import Range
from tests.support.servers import WebServer

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

SIZE = 100_000
PLENTY = 10**9
MakeFetcher = Callable[..., Fetcher]


@pytest.fixture
def data(tmp_path: Path, web: WebServer) -> bytes:
    """Contents of the files a, b and c."""
    data = np.random.default_rng(0).bytes(SIZE)
    for name in "abc":
        (tmp_path / "web" / name).write_bytes(data)
    return data


@pytest.fixture
def make(tmp_path: Path, web: WebServer) -> Iterator[MakeFetcher]:
    made: list[Fetcher] = []

    def make_fetcher(
        *, cached: bool | int, requests: int = 16, ahead_bytes: int = PLENTY, **options: object
    ) -> Fetcher:
        limit = PLENTY if cached is True else cached
        cache = Cache(tmp_path / "cache", limit) if limit else None
        made.append(Fetcher(Location(web.url, **options), cache, requests=requests, ahead_bytes=ahead_bytes))
        return made[-1]

    yield make_fetcher
    for fetcher in made:
        fetcher.close()


def _spans(web: WebServer, path: str) -> list[tuple[int, int]]:
    """Requested byte ranges [start, end) of a file, sorted."""
    asked = [span for method, found, span in web.requests if (method, found) == ("GET", f"/{path}")]
    return sorted((int(first), int(last) + 1) for first, last in (span[6:].split("-") for span in asked))


def _wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("the condition was not met within 10 seconds")


@pytest.mark.parametrize("cached", [False, True])
def test_expected_ranges_are_read_without_new_requests(
    web: WebServer, data: bytes, make: MakeFetcher, cached: bool
) -> None:
    """Neighbours share one request, and nothing is requested twice."""
    fetcher = make(cached=cached)
    ranges = [Range("a", 0, 5000), Range("a", 6000, 20_000), Range("b", 50_000, 60_000), Range("a", 90_000, SIZE)]
    fetcher.expect(ranges, dict.fromkeys("ab", SIZE))
    _wait_until(lambda: len(web.requests) == 3)
    for path, start, end in ranges:
        assert fetcher.read(path, start, end, SIZE).tobytes() == data[start:end]
    assert len(web.requests) == 3
    for path, expected in (("a", [(0, 20_000), (90_000, SIZE)]), ("b", [(50_000, 60_000)])):
        for (start, end), (first, last) in zip(_spans(web, path), expected, strict=True):
            assert first - 4096 < start <= first < last <= end < last + 4096
            assert cached or (start, end) == (first, last)


def test_prefetched_bytes_are_bounded(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    fetcher = make(cached=False, ahead_bytes=25_000)
    ranges = [Range("abc"[number % 3], 10_000 * number, 10_000 * (number + 1)) for number in range(9)]
    fetcher.expect(ranges, {})
    for number, (path, start, end) in enumerate(ranges):
        _wait_until(lambda: len(web.requests) >= min(number + 2, 9))  # noqa: B023 - at once
        time.sleep(0.02)
        assert len(web.requests) <= number + 2
        assert fetcher.read(path, start, end).tobytes() == data[start:end]
    assert len(web.requests) == 9


def test_unread_ranges_do_not_block_later_prefetching(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    fetcher = make(cached=False, ahead_bytes=25_000)
    fetcher.expect([Range("a", 0, 10_000), Range("b", 0, 10_000), Range("c", 0, 10_000)], {})
    _wait_until(lambda: len(web.requests) == 2)
    time.sleep(0.02)
    assert fetcher.read("c", 0, 10_000).tobytes() == data[:10_000]
    later = [Range("a", 20_000, 30_000), Range("b", 20_000, 30_000)]
    fetcher.expect(later, {})
    _wait_until(lambda: len(web.requests) >= 4)


RECORD = 2 * BLOCK


def _epochs(count: int) -> list[Range]:
    """Records of the files a, b and c, 36 an epoch, in a random order; no two share a request."""
    rng, found = np.random.default_rng(0), list[Range]()
    records = [Range(path, start, start + RECORD) for path in "abc" for start in range(0, SIZE - RECORD, RECORD)]
    for _ in range(count):
        found += [records[at] for at in rng.permutation(len(records))]
    pairs = zip(found, [found[-1], *found[:-1]], strict=True)
    return [one for one, last in pairs if not 0 <= one.start - last.end <= GAP]


@pytest.mark.parametrize("ahead_bytes", [PLENTY, 10 * RECORD])
def test_a_full_cache_costs_few_requests_more_than_none(
    web: WebServer, data: bytes, make: MakeFetcher, ahead_bytes: int
) -> None:
    """Three announced epochs: without a cache, twice with one that holds a third, and with a tiny one."""
    asked, order = [], _epochs(3)
    for room in (0, 100_000, 100_000, 10_000):
        web.requests.clear()
        fetcher = make(cached=room, ahead_bytes=ahead_bytes)
        fetcher.expect(order, dict.fromkeys("abc", SIZE))
        for path, start, end in order:
            assert fetcher.read(path, start, end, SIZE).tobytes() == data[start:end]
        fetcher.close()
        assert fetcher.held == 0
        asked.append(sum(end - start for path in "abc" for start, end in _spans(web, path)) // RECORD)
        assert len(web.requests) <= asked[-1]
    none, first, second, tiny = asked
    records = len(set(order))
    assert none == records or ahead_bytes < PLENTY
    # How much the cache helps depends on what its files hold when it is full; it never costs more than a few.
    assert max(first, tiny) <= 1.25 * none
    assert second < first


def test_a_range_expected_several_times_is_requested_once(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    fetcher, item = make(cached=False), Range("a", 0, 5000)
    for _ in range(3):
        fetcher.expect([item], {"a": SIZE})
    for left in (2, 1, 0):
        assert fetcher.read(*item, SIZE).tobytes() == data[:5000]
        assert fetcher.held == (5000 if left else 0)
    assert len(web.requests) == 1


def test_filling_takes_few_large_requests_and_fetches_every_byte_once(
    tmp_path: Path, web: WebServer, make: MakeFetcher
) -> None:
    size = 2 * LARGEST + 12_345
    whole = np.random.default_rng(1).integers(0, 256, size, np.uint8)
    whole.tofile(tmp_path / "web" / "long")
    fetcher = make(cached=True)
    fetcher.fill([Range("long", 0, size)], {"long": size})
    fetcher.expect([Range("long", LARGEST - 5, LARGEST + 5)], {})
    assert np.array_equal(fetcher.read("long", 0, size, size), whole)
    spans = _spans(web, "long")
    assert [spans[0][0], *(end for _, end in spans)] == [*(start for start, _ in spans), size]
    assert len(spans) <= 5
    assert make(cached=True).whole_path("long") is not None
    assert len(_spans(web, "long")) == len(spans)


def test_an_expected_range_is_fetched_with_the_bytes_around_it_that_are_to_be_filled(
    tmp_path: Path, web: WebServer, data: bytes, make: MakeFetcher
) -> None:
    """One request is held back meanwhile, so that no other has begun."""
    whole = np.random.default_rng(1).integers(0, 256, 3 * SMALLEST, np.uint8)
    whole.tofile(tmp_path / "web" / "long")
    go, sizes = threading.Event(), {"c": SIZE, "long": len(whole)}
    web.fault = lambda method, path: None if path != "/c" or go.wait(20) else 500
    fetcher = make(cached=True, requests=2)
    fetcher.expect([Range("c", 0, 10)], sizes)
    fetcher.fill([Range("long", 0, len(whole))], sizes)
    ranges = [Range("long", SMALLEST + start, SMALLEST + start + 50) for start in (100_000, 5)]
    fetcher.expect(ranges, sizes)
    go.set()
    _wait_until(lambda: any(path == "/long" for _, path, _ in web.requests))
    for path, start, end in ranges:
        assert np.array_equal(fetcher.read(path, start, end, len(whole)), whole[start:end])
    fetcher.read("long", 0, len(whole), len(whole))
    asked = [span for _, path, span in web.requests if path == "/long"]
    assert asked[0] == f"bytes={SMALLEST}-{2 * SMALLEST - 1}"
    assert sum(last - first for first, last in _spans(web, "long")) == len(whole)


def test_concurrent_requests_are_bounded(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    at_once, most, guard, are_three = 0, 0, threading.Lock(), threading.Event()

    def slow(method: str, path: str) -> None:
        nonlocal at_once, most
        with guard:
            at_once += 1
            most = max(most, at_once)
            if at_once == 3:
                are_three.set()
        are_three.wait(20)
        time.sleep(0.01)  # so that a sixth could come
        with guard:
            at_once -= 1

    web.fault = slow
    fetcher = make(cached=False, requests=5)
    ranges = [Range(path, 20_000 * part, 20_000 * part + 10) for path in "abc" for part in range(5)]
    fetcher.expect(ranges, {})
    threads = [threading.Thread(target=fetcher.read, args=(*item, SIZE)) for item in reversed(ranges)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 3 <= most <= 5
    assert len(web.requests) == len(ranges)


@pytest.mark.parametrize("cached", [False, True])
def test_a_waiting_reader_precedes_prefetching(web: WebServer, data: bytes, make: MakeFetcher, cached: bool) -> None:
    """Meanwhile the server answers none of the prefetching requests."""
    go = threading.Event()
    web.fault = lambda method, path: None if path == "/c" or go.wait(20) else 500
    fetcher = make(cached=cached, requests=3)
    sizes = dict.fromkeys("abc", SIZE)
    fetcher.fill([Range("a", 0, SIZE), Range("b", 0, SIZE)], sizes)
    fetcher.expect(
        [Range("a", 0, 10), Range("b", 50_000, 50_010), Range("c", 0, 10), Range("c", 50_000, 50_010)], sizes
    )
    assert fetcher.read("c", 50_000, 50_010, SIZE).tobytes() == data[50_000:50_010]
    assert not go.is_set()
    go.set()


@pytest.mark.parametrize("cached", [False, True])
def test_occasional_failures_are_retried(
    web: WebServer, data: bytes, make: MakeFetcher, cached: bool, quick: list[float]
) -> None:
    guard, count = threading.Lock(), 0

    def fault(method: str, path: str) -> int | None:
        nonlocal count
        with guard:
            count += 1
            return 503 if count % 20 == 7 else None

    web.fault = fault
    fetcher = make(cached=cached)
    ranges = [Range("abc"[part % 3], 1000 * part, 1000 * part + 700) for part in range(99)]
    fetcher.expect(ranges, dict.fromkeys("abc", SIZE))
    for path, start, end in ranges:
        assert fetcher.read(path, start, end, SIZE).tobytes() == data[start:end]
    fetcher.close()
    assert len(web.requests) <= 99 + 99 / 19 + 1


def test_a_failing_server_gets_few_requests(
    web: WebServer, data: bytes, make: MakeFetcher, quick: list[float]
) -> None:
    """Readers that wait and requests in flight make six attempts each; then prefetching stops."""
    web.fault = lambda method, path: 503
    fetcher = make(cached=False, requests=4)
    ranges = [Range("abc"[part % 3], 1000 * part, 1000 * part + 700) for part in range(90)]
    fetcher.expect(ranges, {})
    for item in ranges[:5]:
        with pytest.raises(DatamergeError, match="503"):
            fetcher.read(*item)
    assert len(web.requests) <= 6 * (3 + 5 + 3)


@pytest.mark.parametrize("cached", [False, True])
def test_a_stalled_request_is_repeated_with_a_warning(
    web: WebServer, data: bytes, make: MakeFetcher, cached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_threads, "SILENT_SECONDS", 0.25)
    go, asked = threading.Event(), 0

    def stall(method: str, path: str) -> None:
        nonlocal asked
        asked += 1
        if asked <= 2:
            go.wait(20)

    web.fault = stall
    fetcher = make(cached=cached, client_kwargs={"timeout": aiohttp.ClientTimeout(sock_read=0.5)})
    with pytest.warns(RuntimeWarning, match=f"{web.url}/a: nothing has come for "):
        assert fetcher.read("a", 100, 200, SIZE).tobytes() == data[100:200]
    assert asked == 3
    go.set()


@pytest.mark.parametrize("manner", ["no ranges", "no length, no ranges"])
def test_a_server_without_ranges_sends_each_file_once(
    web: WebServer, data: bytes, make: MakeFetcher, manner: str
) -> None:
    web.ranges, web.manners = False, {"chunked"} if "length" in manner else set()
    fetcher = make(cached=True)
    fetcher.fill([Range(path, 0, SIZE) for path in "abc"], dict.fromkeys("abc", SIZE))
    fetcher.expect([Range(path, 5000 * part, 5000 * part + 9) for part in range(9) for path in "abc"], {})
    for path in "abc":
        assert fetcher.read(path, 40_000, 50_000, SIZE).tobytes() == data[40_000:50_000]
    fetcher.close()
    # Requests in flight before the first answer are not read to their end.
    assert len([span for _, _, span in web.requests if span]) <= 16
    whole = [path for _, path, span in web.requests if not span]
    assert len(whole) == len(set(whole))


def test_a_file_shorter_than_recorded_is_corruption(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    fetcher = make(cached=True)
    fetcher.fill([Range("a", 0, SIZE + 5000)], {"a": SIZE + 5000})
    with pytest.raises(CorruptShard, match=f"{web.url}/a: .*cut short"):
        fetcher.read("a", SIZE - 10, SIZE + 10, SIZE + 5000)
    with pytest.raises(FileNotFoundError):
        fetcher.read("none", 0, 10, SIZE)


def _arguments(name: str) -> list[Any]:
    found = (vars(thread).get("_args") for thread in threading.enumerate() if thread.name == name)
    return [arguments for arguments in found if arguments]


def test_no_thread_is_left(web: WebServer, data: bytes, make: MakeFetcher) -> None:
    fetcher = make(cached=True)
    fetcher.fill([Range(path, 0, SIZE) for path in "abc"], dict.fromkeys("abc", SIZE))
    fetcher.read("a", 0, 10, SIZE)
    fetcher.close()
    # Threads of other tests may still wait for silent servers; a thread drops its arguments when it ends.
    _wait_until(lambda: not [found for found in _arguments("fetch") if found[0]() is fetcher])


PROGRAM = """
import sys
from storage_schemas import Cache, Location
from storage_schemas.access.fetching import Fetcher
from storage_schemas.access.pieces import Range
fetcher = Fetcher(Location(sys.argv[1]), Cache(sys.argv[2], 10**9) if sys.argv[3] == "cached" else None)
fetcher.fill([Range("b", 0, 100_000)], {"b": 100_000})
fetcher.expect([Range("b", 0, 10)], {})
print("begun", flush=True)
if sys.argv[4] == "waits":
    fetcher.read("a", 0, 10, 100_000)
"""


@pytest.mark.parametrize(("cached", "how"), [("cached", "ends"), ("uncached", "waits")])
def test_a_process_ends_though_the_server_stalls(
    tmp_path: Path, web: WebServer, data: bytes, cached: str, how: str
) -> None:
    """By itself, or on Ctrl-C while it waits; it reports no error but KeyboardInterrupt."""
    go = threading.Event()
    web.fault = lambda method, path: 500 if go.wait(30) else None
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, web.url, str(tmp_path / "cache"), cached, how],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    if how == "waits":
        _wait_until(lambda: any(path == "/a" for _, path, _ in web.requests))
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    go.set()
    assert process.returncode == (-signal.SIGINT if how == "waits" else 0)
    assert not errors if how == "ends" else errors.splitlines()[-1] == "KeyboardInterrupt"


def test_a_forked_process_fetches_on_its_own(tmp_path: Path, web: WebServer, data: bytes) -> None:
    from storage_schemas.access.cache import CachedLocation
    from storage_schemas.access.fetchers import fetcher_of

    location = CachedLocation.of(Location(web.url), Cache(tmp_path / "cache", PLENTY))
    fetcher_of(location).read("a", 0, 10, SIZE)
    child = os.fork()
    if not child:
        found = fetcher_of(location).read("b", 0, 10, SIZE).tobytes()
        os._exit(0 if found == data[:10] else 1)
    assert os.waitpid(child, 0)[1] == 0
    web.requests.clear()
    assert fetcher_of(location).read("b", 0, 10, SIZE).tobytes() == data[:10]
    assert web.requests == []
