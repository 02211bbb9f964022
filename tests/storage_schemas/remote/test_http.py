"""Artifacts behind a web server: read with ranges or without, never written, no secret shown."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import aiohttp
import pytest

from storage_schemas import (
    ArtifactWriter,
    CorruptShard,
    DatamergeError,
    Layout,
    Location,
    NotAnArtifact,
    Record,
    UserError,
    open_artifact,
)
from storage_schemas.access.redaction import redact
from storage_schemas.access.retries import ATTEMPTS, LONGEST_DELAY, is_transient
from tests.support.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]


@pytest.mark.parametrize("ranges", [True, False])
def test_round_trip(
    tmp_path: Path,
    web: Any,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    format_name: str,
    ranges: bool,
) -> None:
    """Also from `python -m http.server`, which answers a range with the whole file."""
    records = write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    web.ranges = ranges
    artifact = open_artifact(f"{web.url}/a")
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    assert web.listed == []
    assert all(span for method, path, span in web.requests if method == "GET" and not path.endswith(".json"))


def test_a_signed_url_signs_every_request_and_is_never_shown(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write, same_record: Same
) -> None:
    records = write_artifact(tmp_path / "web" / "a", make_layout("webdataset"))
    web.fault = lambda method, path: None if path.endswith("?sig=s3cret&v=1") else 403
    host = web.url.removeprefix("http://")
    artifact = open_artifact(f"http://user:passw0rd@{host}/a?sig=s3cret&v=1")
    for found, expected in zip(artifact, records, strict=True):
        same_record(found, expected)
    assert artifact.location.url == f"http://***@{host}/a"
    messages = []
    (tmp_path / "web" / "a" / "shards" / "00000.tar").unlink()
    with pytest.raises(CorruptShard) as corrupt:
        artifact[0]
    messages.append(str(corrupt.value))
    web.fault = lambda method, path: 403
    for url in (f"http://user:passw0rd@{host}/a?sig=s3cret&v=1", f"http://user:passw0rd@{host}/a"):
        with pytest.raises(UserError) as denied:
            open_artifact(url)
        messages.append(str(denied.value))
    web.fault = lambda method, path: 418
    with pytest.raises(DatamergeError) as failed:
        open_artifact(f"http://user:passw0rd@{host}/a?sig=s3cret&v=1")
    messages.append(str(failed.value))
    for message in messages:
        assert "passw0rd" not in message
        assert "s3cret" not in message
        assert "\n" not in message


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_transient_failures_are_retried(
    tmp_path: Path,
    web: Any,
    quick: list[float],
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    status: int,
) -> None:
    write_artifact(tmp_path / "web" / "a", make_layout("zarr"))
    answers = [status, status, None, status, None]
    web.fault = lambda method, path: answers.pop(0) if answers else None
    assert [record.key for record in open_artifact(f"{web.url}/a")] == [f"k{number}" for number in range(7)]
    assert len(quick) == 3
    assert 0.2 <= quick[1] / quick[0] <= 4  # doubles, and the jitter takes up to half
    assert all(0 < wait <= LONGEST_DELAY for wait in quick)


@pytest.mark.parametrize(("asked", "shortest", "longest"), [("7", 7, 7), ("86400", 60, 60), ("Sun, 29 Nov", 0, 1)])
def test_retry_after_is_respected(
    tmp_path: Path, web: Any, quick: list[float], asked: str, shortest: float, longest: float
) -> None:
    (tmp_path / "web").mkdir(exist_ok=True)
    (tmp_path / "web" / "a").write_bytes(b"here")
    answers = [429, None]
    web.fault, web.retry_after = lambda method, path: answers.pop(0) if answers else None, asked
    assert Location(web.url).read("a") == b"here"
    assert len(quick) == 1
    assert shortest <= quick[0] <= longest


def test_an_untrusted_certificate_is_not_transient() -> None:
    """aiohttp calls it a lost connection; botocore and others have the error of `ssl` as the cause."""
    failure = ssl.SSLCertVerificationError("self-signed certificate")
    assert not is_transient(aiohttp.ClientConnectorCertificateError(cast(Any, None), failure))
    wrapped = ConnectionError("cannot connect")
    wrapped.__cause__ = failure
    assert not is_transient(wrapped)


@pytest.mark.parametrize(("status", "error"), [(403, UserError), (404, NotAnArtifact), (400, DatamergeError)])
def test_refusals_are_not_retried(web: Any, quick: list[float], status: int, error: type[Exception]) -> None:
    web.fault = lambda method, path: status
    with pytest.raises(error):
        open_artifact(f"{web.url}/a")
    assert len(web.requests) == 1
    assert quick == []


def test_an_unreachable_server_is_a_one_line_error(web: Any, quick: list[float]) -> None:
    with refused(DatamergeError, None, "http://127.0.0.1:9/a/manifest.json"):
        open_artifact("http://127.0.0.1:9/a")
    assert len(quick) == ATTEMPTS - 1


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6])
def test_a_truncated_file_is_corruption(
    tmp_path: Path, web: Any, make_layout: Callable[..., Layout], write_artifact: Write, format_name: str, kept: float
) -> None:
    """Also for ranges past the end, which servers refuse."""
    write_artifact(tmp_path / "web" / "a", make_layout(format_name))
    artifact = open_artifact(f"{web.url}/a")
    for file in artifact.commit(0).files:
        path = tmp_path / "web" / "a" / file.path
        data = path.read_bytes()
        path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CorruptShard):
        artifact[2]


def test_nothing_is_written_over_http(
    web: Any, make_layout: Callable[..., Layout], provenance: dict[str, Any]
) -> None:
    with refused(UserError, None, f"{web.url}/b", "http(s)"):
        ArtifactWriter(Location(f"{web.url}/b"), make_layout(), provenance).begin({})
    assert not any(method in ("PUT", "POST") for method, _, _ in web.requests)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a", "s3://bucket/a"),
        ("photos/a b.png", "photos/a b.png"),
        ("https://me:pw@host/a", "https://***@host/a"),
        ("https://token@host/a?x=1", "https://***@host/a?x=***"),
        ("403, url='http://h/a?sig=abc&se=1', retry", "403, url='http://h/a?sig=***&se=***', retry"),
        ("(https://h/a?SECRET), http://h/a?x=1&SECRET", "(https://h/a?***), http://h/a?x=***&***"),
        ("s3://bucket/img-?.png", "s3://bucket/img-?.png"),
        ("is 3 = 4? no=way", "is 3 = 4? no=way"),
        ("runs/?a=b", "runs/?a=b"),
        ("URL('https://u:p@h:8/a'), s3://k:s@b/x", "URL('https://***@h:8/a'), s3://***@b/x"),
    ],
)
def test_redact(text: str, shown: str) -> None:
    assert redact(text) == shown
