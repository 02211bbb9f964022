"""Prefetching: the same batches, no byte twice, none that the run does not read, and no threads at the end."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainer.data.ahead
from storage_schemas import Artifact, Cache, UserError, open_artifact
from storage_schemas.access.block_file import BLOCK
from tests.support.refusals import refused
from tests.support.servers import WebServer
from trainer.data.ahead import Course
from trainer.data.order import Order, Partition
from trainer.data.stream import Collate, ended, stream

MakeArtifact = Callable[..., str]
# Large enough for a record to be several blocks of the cache: 128 KiB of sums and scatter each.
SHAPE = (1, 128, 256)
COLLATE = Collate("avg", labels=False, members=1)
BATCH, SEED = 3, 5


@pytest.fixture
def serve(tmp_path: Path, web: WebServer, make_artifact: MakeArtifact) -> Callable[[str], str]:
    """A function that writes an artifact of 10 groups in 3 shards for the web server, and returns its URL."""

    def make(form: str) -> str:
        make_artifact(name="web/a", format=form, shape=SHAPE)
        web.requests.clear()
        return f"{web.url}/a"

    return make


def _stream(artifact: Artifact, start: int, stop: int, workers: int = 0, partition: Partition | None = None) -> Any:
    order = Order(artifact.shard_sizes, BATCH, SEED)
    partition = partition or Partition()
    return stream(artifact, order, COLLATE, start=start, stop=stop, workers=workers, pin=False, partition=partition)


def _assert_same(found: Iterator[Any], expected: Iterator[Any]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys == other.keys
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.variance, other.variance)
        assert torch.equal(one.target, other.target)


def _spans(web: WebServer) -> dict[str, list[tuple[int, int]]]:
    """Byte ranges [first, last] of shard files that were sent, by path."""
    found = defaultdict(list)
    for method, path, span in web.requests:
        if method == "GET" and ("/shards/" in path or "/c/" in path):
            first, _, last = span.removeprefix("bytes=").partition("-")
            found[path].append((int(first), int(last)))
    return {path: sorted(spans) for path, spans in found.items()}


def _assert_no_byte_twice(web: WebServer) -> None:
    for path, spans in _spans(web).items():
        assert all(last < first for (_, last), (first, _) in pairwise(spans)), (path, spans)


def _bytes_sent(web: WebServer) -> int:
    return sum(last + 1 - first for spans in _spans(web).values() for first, last in spans)


def _bytes_needed(artifact: Artifact, stop: int) -> int:
    """Number of bytes that the steps before `stop` read, each counted once, with the indices of Zarr shards."""
    order = Order(artifact.shard_sizes, BATCH, SEED)
    own = artifact.only(COLLATE.arrays())
    ranges = set()
    for index in order.batches_joined(0, stop).tolist():
        position, at = own._place(index)
        commit = own.commit(position)
        if artifact.manifest.layout.format == "zarr":
            ranges |= {*own._reader.index_ranges(commit, own._specs)}
        ranges |= {*own._reader.ranges(commit, at, own._specs)}
    return sum(one.end - one.start for one in ranges)


def _assert_no_threads() -> None:
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("datamerge-")]


@pytest.mark.parametrize("form", ["webdataset", "zarr"])
@pytest.mark.parametrize("cached", [True, False])
def test_remote_batches_equal_local_ones_and_no_byte_is_sent_twice(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str], form: str, cached: bool
) -> None:
    url, cache = serve(form), Cache(tmp_path / "cache", 10**9) if cached else None
    local, steps = open_artifact(tmp_path / "web/a"), 4
    artifact = open_artifact(url, cache=cache)
    _assert_same(_stream(artifact, 0, steps), _stream(local, 0, steps))
    _assert_no_byte_twice(web)
    assert _bytes_sent(web) <= 1.05 * artifact.only(COLLATE.arrays()).bytes_read
    web.requests.clear()
    cut = Partition(1, 2, 2)
    _assert_same(_stream(artifact, 3, 2 * steps, 0, cut), _stream(local, 3, 2 * steps, 0, cut))
    assert (_bytes_sent(web) == 0) is cached  # with a cache, later epochs are read from it
    _assert_no_threads()


@pytest.mark.parametrize("form", ["webdataset", "zarr"])
@pytest.mark.parametrize("cached", [True, False])
def test_only_bytes_that_the_run_reads_are_fetched(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str], form: str, cached: bool
) -> None:
    url, cache = serve(form), Cache(tmp_path / "cache", 10**9) if cached else None
    list(_stream(open_artifact(url, cache=cache), 0, 2))
    needed = _bytes_needed(open_artifact(tmp_path / "web/a"), 2)
    # Ranges for the cache are rounded to blocks; of tars, the headers between two arrays are fetched too.
    slack = 2 * BATCH * 3 * 2 * BLOCK
    assert needed <= _bytes_sent(web) <= needed + slack
    _assert_no_byte_twice(web)


@pytest.mark.parametrize("form", ["webdataset", "zarr"])
def test_a_continued_run_fetches_nothing_twice(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str], form: str
) -> None:
    url, local = serve(form), open_artifact(tmp_path / "web/a")
    for start, stop in ((0, 2), (2, 4)):
        artifact = open_artifact(url, cache=Cache(tmp_path / "cache", 10**9))
        with ended(_stream(artifact, start, 4)) as batches:
            for expected in _stream(local, start, stop):
                assert next(batches).keys == expected.keys
        _assert_no_threads()
    _assert_no_byte_twice(web)


def test_data_workers_share_a_cache_and_fetch_nothing_twice(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str]
) -> None:
    artifact = open_artifact(serve("zarr"), cache=Cache(tmp_path / "cache", 10**9))
    _assert_same(_stream(artifact, 1, 8, 2), _stream(open_artifact(tmp_path / "web/a"), 1, 8))
    _assert_no_byte_twice(web)


def test_sidecars_and_records_of_a_batch_are_requested_concurrently(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str]
) -> None:
    """The server answers no sidecar before all three are requested, and no record before three are."""
    url, stages = serve("webdataset"), {"/commits/": threading.Barrier(3), "/shards/": threading.Barrier(3)}

    def fault(method: str, path: str) -> None:
        for part, barrier in stages.items():
            if part in path:
                barrier.wait(20)

    web.fault = fault
    order = Order([4, 4, 2], BATCH, SEED)
    first = next(step for step in range(40) if len({index // 4 for index in order.batch(step)}) == 3)
    with ended(_stream(open_artifact(url), first, first + 1)) as batches:
        assert len(next(batches).keys) == BATCH


def test_the_end_of_one_stream_does_not_cancel_another(
    tmp_path: Path, web: WebServer, serve: Callable[[str], str]
) -> None:
    """Of two streams of one `Artifact`, the second is waiting for the server when the first ends."""
    artifact, local = open_artifact(serve("webdataset")), open_artifact(tmp_path / "web/a")
    waiting, go, found = threading.Event(), threading.Event(), list[Any]()
    with ended(_stream(artifact, 0, 1)) as first:
        next(first)

        def hold(method: str, path: str) -> None:
            waiting.set()
            go.wait(20)

        web.fault = hold
        second = threading.Thread(target=lambda: found.extend(_stream(artifact, 1, 3)))
        second.start()
        assert waiting.wait(20)
    go.set()
    second.join(20)
    _assert_same(iter(found), _stream(local, 1, 3))
    _assert_no_threads()


def test_a_record_that_cannot_be_fetched_is_one_error(web: WebServer, serve: Callable[[str], str]) -> None:
    artifact = open_artifact(serve("webdataset"))
    web.fault = lambda method, path: 403 if "/shards/" in path else None
    with refused(UserError, None, web.url, "shards", 403), ended(_stream(artifact, 0, 4)) as batches:
        next(batches)
    _assert_no_threads()
    # Failed prefetches are not repeated without end.
    assert len([path for _, path, _ in web.requests if "/shards/" in path]) <= 4 * BATCH * 2


@pytest.mark.parametrize("start", [0, 2, 5])
@pytest.mark.parametrize(("rank", "world", "here"), [(0, 1, 1), (3, 4, 4), (2, 4, 2), (1, 3, 1), (2, 6, 3)])
def test_the_groups_of_a_machine_are_those_of_its_processes(
    monkeypatch: pytest.MonkeyPatch, start: int, rank: int, world: int, here: int
) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank % here))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    order = Order([7, 5, 9, 4], 8, SEED)  # 25 groups: the last batch of an epoch is short
    stop, found = Course(order, Partition(rank, world, 2), start, 9).groups_here(start, 1000)
    processes = range(rank - rank % here, rank - rank % here + here)
    expected = [
        index
        for step in range(start, stop)
        for process in processes
        for share in order.shares(step, Partition(process, world, 2))
        for index in share.indices
    ]
    assert (stop, found.tolist()) == (9, expected)


def test_shards_are_divided_in_order_of_first_use() -> None:
    reads, ends = np.array([9, 2, 8, 3, 0, 9, 5]), np.array([4, 6, 10])
    divided = [list(trainer.data.ahead._by_shard(reads, np.unique(reads), ends, part, 2)) for part in (0, 1)]
    assert divided == [[[8, 9, 5]], [[0, 2, 3]]]


def test_cached_records_are_not_requested_ahead(
    tmp_path: Path, serve: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    announced, expect, own = [0], Artifact.expect, list[Artifact]()

    def counted(artifact: Artifact, indices: Sequence[int]) -> int:
        announced[0] += 1
        own[:] = [artifact]
        return expect(artifact, indices)

    monkeypatch.setattr(Artifact, "expect", counted)
    artifact, local = open_artifact(serve("webdataset"), cache=Cache(tmp_path / "cache", 10**9)), tmp_path / "web/a"
    found, expected = _stream(artifact, 0, 400_000), _stream(open_artifact(local), 0, 400_000)
    with ended(found), ended(expected):
        _assert_same(islice(found, 40), islice(expected, 40))
        end = time.monotonic() + 20
        while not own[0].is_filled:
            assert time.monotonic() < end
            time.sleep(0.01)
        _assert_same(islice(found, 400), islice(expected, 400))  # some blocks were announced before
        before = announced[0]
        _assert_same(islice(found, 400), islice(expected, 400))
    assert announced[0] == before  # nor at the end
    _assert_no_threads()
