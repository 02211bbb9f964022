"""Records of a remote artifact in a known order: the same records, concurrent requests, no byte fetched twice."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from storage_schemas import Cache, CorruptShard, Layout, Location, Record, open_artifact
from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.in_order import BLOCKS, in_order
from storage_schemas.sidecars import CACHED_COMMITS
from storage_schemas.verify import verify
from tests.support.refusals import refused
from tests.support.servers import WebServer

Make = Callable[..., Layout]
Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]
SHUFFLED = (5, 0, 6, 6, 2, 1, 4, 3)


def _is_data(path: str) -> bool:
    return "/shards/" in path or "/c/" in path


def _requested(requests: Iterable[tuple[str, str, str]]) -> list[tuple[str, int, int]]:
    """Path, first and last byte of every requested range of a shard, sorted."""
    found = [(path, span.removeprefix("bytes=").split("-")) for _, path, span in requests if _is_data(path)]
    return sorted((path, int(start), int(end)) for path, (start, end) in found)


def _wait_for_two(web: WebServer) -> list[bool]:
    """Hold back the first answer with data until a second request; the list says whether one came within 20 s."""
    first, second, were_two = threading.Event(), threading.Event(), list[bool]()

    def hold(method: str, path: str) -> None:
        if _is_data(path):
            if first.is_set():
                second.set()
            else:
                first.set()
                were_two.append(second.wait(20))

    web.fault = hold
    return were_two


@pytest.mark.parametrize("cached", [False, True])
def test_next_records_are_requested_before_the_first_answer(
    tmp_path: Path,
    web: WebServer,
    make_layout: Make,
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    cached: bool,
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    artifact = open_artifact(f"{web.url}/a", cache=Cache(tmp_path / "cache", 10**9) if cached else None)
    were_two = _wait_for_two(web)
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    assert were_two == [True]
    if not cached:  # with a cache, the reader may fetch its part before the prefetching does
        # Three shards, each a tar or five arrays with an index: neighbours share a request.
        assert len(_requested(web.requests)) == (3 * 5 * 2 if format_name == "zarr" else 3)
    assert all(one[0] != other[0] or one[2] < other[1] for one, other in pairwise(_requested(web.requests)))


def test_any_order_of_indices_is_accepted(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write, same_record: Same, format_name: str
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    for artifact in (open_artifact(f"{web.url}/a"), open_artifact(tmp_path / "web" / "a")):
        for found, index in zip(artifact.records(SHUFFLED), SHUFFLED, strict=True):
            same_record(found, records[index])
        assert [record.key for record in artifact.records(np.array([-1, 0]))] == ["k6", "k0"]
        assert [record.key for record in artifact.only([])] == [record.key for record in records]
        with pytest.raises(IndexError, match="7 of 7"):
            list(artifact.records([0, 7]))
    one_at_a_time = in_order(open_artifact(f"{web.url}/a"), SHUFFLED, window=1)
    assert [record.key for record in one_at_a_time] == [records[index].key for index in SHUFFLED]


def test_prefetched_bytes_are_bounded(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write, format_name: str
) -> None:
    layout = make_layout(format_name, groups=30)
    write_artifact(tmp_path / "web" / "a", layout)
    artifact = open_artifact(f"{web.url}/a")
    expected: list[int] = []
    reads = 0

    def asked() -> Iterable[int]:
        for index in range(30):
            expected.append(index)
            yield index

    for _ in in_order(artifact, asked(), window=BLOCKS * 2 * artifact.record_bytes):
        reads += 1
        assert len(expected) <= reads + 2 * (BLOCKS + 1)
    assert reads == 30


def test_sidecars_of_single_records_are_read_once(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write
) -> None:
    """The window would hold thousands of small records, but the sidecars of so many shards are not kept."""
    count = 2 * CACHED_COMMITS
    layout = make_layout("webdataset", groups=count, extras=()).model_copy(update={"groups_per_shard": 1})
    write_artifact(tmp_path / "web" / "a", layout)
    assert sum(1 for _ in open_artifact(f"{web.url}/a")) == count
    sidecars = [path for path in web.fetched() if "/commits/" in path]
    assert len(sidecars) == len(set(sidecars)) == count


def test_stopping_early_cancels_prefetching(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write, format_name: str
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    artifact = open_artifact(f"{web.url}/a")
    with closing(in_order(artifact, range(7))) as records:
        next(records)
    fetcher = fetcher_of(artifact.location)
    fetcher.close()
    assert fetcher.held == 0


def test_a_missing_shard_is_an_error_when_it_is_reached(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout("webdataset"))
    (tmp_path / "web" / "a" / "shards" / "00001.tar").unlink()
    read: list[str] = []
    with refused(CorruptShard, None, "00001.tar", "missing"):
        read.extend(record.key for record in open_artifact(f"{web.url}/a"))
    assert read == ["k0", "k1", "k2"]


def test_files_are_verified_concurrently(
    tmp_path: Path, web: WebServer, make_layout: Make, write_artifact: Write, format_name: str
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    were_two = _wait_for_two(web)
    report = verify(Location(f"{web.url}/a"))
    assert (report.problems, report.groups, were_two) == ([], 7, [True])
