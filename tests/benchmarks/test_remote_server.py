"""The server of the streaming benchmark: its answers, its log, and the failures and delays that can be set."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest

from benchmarks.remote_server import Remote, Request, running
from benchmarks.streaming import twice

DATA = bytes(range(256)) * 1000


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[Remote]:
    (tmp_path / "bucket" / "a").mkdir(parents=True)
    (tmp_path / "bucket" / "a" / "x.tar").write_bytes(DATA)
    for number in range(3):
        (tmp_path / "bucket" / "a" / f"{number} <&>.txt").write_bytes(b"%d" % number)
    with running(tmp_path) as remote:
        yield remote


def _get(remote: Remote, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(remote.url).netloc, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_files_and_ranges_are_sent(remote: Remote) -> None:
    path, size = "/bucket/a/x.tar", len(DATA)
    assert _get(remote, path)[::2] == (200, DATA)
    for span, start, end in (
        ("5-9", 5, 10),
        ("100-", 100, size),
        (f"0-{10 * size}", 0, size),
        ("-7", size - 7, size),
    ):
        status, headers, body = _get(remote, path, Range=f"bytes={span}")
        assert (status, headers["content-range"]) == (206, f"bytes {start}-{end - 1}/{size}")
        assert body == DATA[start:end]
    status, headers, body = _get(remote, path, Range=f"bytes={size}-")
    assert (status, headers["content-range"], body) == (416, f"bytes */{size}", b"")
    status, headers, body = _get(remote, path, "HEAD")
    assert (status, headers["content-length"], body) == (200, str(size), b"")
    assert headers["etag"] == _get(remote, path, Range="bytes=0-0")[1]["etag"]
    assert _get(remote, "/bucket/a/none")[0] == _get(remote, "/../secret")[0] == 404


def test_its_log_has_the_bytes_that_were_sent(remote: Remote) -> None:
    for span in ("0-9", "5-19", "30-39"):
        _get(remote, "/bucket/a/x.tar", Range=f"bytes={span}")
    _get(remote, "/bucket/a/x.tar", "HEAD")
    _get(remote, "/bucket/a/none")
    log, _ = remote.log()
    assert [(one.method, one.status, one.start, one.end) for one in log] == [
        ("GET", 206, 0, 10),
        ("GET", 206, 5, 20),
        ("GET", 206, 30, 40),
        ("HEAD", 200, 0, 0),
        ("GET", 404, 0, 0),
    ]
    assert twice(log) == 5
    assert remote.log()[0] == []


def test_failures_and_delays_can_be_set(remote: Remote) -> None:
    remote.set(fail=1)
    assert _get(remote, "/bucket/a/x.tar")[0] == 503
    remote.set(fail=0, rate=1e9, total=1e9, latency=0.001, stall=0.001, stalls=1)
    assert [_get(remote, "/bucket/a/x.tar")[2] == DATA for _ in range(2)] == [True, True]


def test_an_s3_client_reads_and_lists_it(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"key": "k", "secret": "s", "endpoint_url": remote.url, "use_listings_cache": False}
    fs = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    names = [f"bucket/a/{number} <&>.txt" for number in range(3)]
    assert fs.find("bucket") == sorted([*names, "bucket/a/x.tar"])
    assert fs.ls("bucket") == ["bucket/a"]
    assert fs.cat_file("bucket/a/x.tar", start=7, end=300) == DATA[7:300]
    assert fs.info("bucket/a/x.tar")["size"] == len(DATA)
    assert fs.cat_file(names[2]) == b"2"
    assert not fs.exists("bucket/b")


def test_bytes_sent_twice_are_counted_by_file() -> None:
    def sent(path: str, start: int, end: int) -> Request:
        return Request("GET", path, start, end, 206, 0.0, 0.0)

    log = [sent("/a", 0, 10), sent("/b", 0, 10), sent("/a?x=1", 2, 6), sent("/a", 8, 12), sent("/a", 0, 12)]
    assert twice(log) == 4 + 2 + 12
    assert twice(log[:2]) == 0
