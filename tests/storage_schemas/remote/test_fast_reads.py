"""Range reads through obstore: the same bytes and requests as the file system's, which takes over where they fail."""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiobotocore.credentials
import aiobotocore.session
import numpy as np
import pytest

from storage_schemas import DatamergeError, Location, UserError
from storage_schemas.access import fast_reads
from storage_schemas.access.fast_reads import FAILURES, RangeReads
from storage_schemas.access.retries import ATTEMPTS
from tests.support.refusals import refused
from tests.support.servers import MANNERS, S3Server, WebServer

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")

DATA = np.random.default_rng(0).bytes(10_000)
RANGES = [(0, 1), (5, 5000), (9_990, 10_000), (0, 10_000), (9_000, 11_000), (10_000, 10_001), (7, 7)]
PLENTY = 1000
# Headers that change with every request, or that name the client.
_VARYING = {
    "HTTP_USER_AGENT",
    "HTTP_AUTHORIZATION",
    "HTTP_X_AMZ_DATE",
    "HTTP_ACCEPT",
    "HTTP_ACCEPT_ENCODING",
    "HTTP_DATE",
}
_VARYING |= {"HTTP_X_AMZ_CHECKSUM_MODE", "HTTP_AMZ_SDK_INVOCATION_ID", "HTTP_AMZ_SDK_REQUEST"}


@pytest.fixture
def asked(s3: S3Server) -> list[dict[str, Any]]:
    """The WSGI environment of every request to the S3 server."""
    seen: list[dict[str, Any]] = []

    def rule(environ: dict[str, Any]) -> None:
        seen.append({**environ})

    s3.rule = rule
    return seen


def _is_fast(environ: dict[str, Any]) -> bool:
    return str(environ["HTTP_USER_AGENT"]).startswith("object_store")


def _comparable(environ: dict[str, Any]) -> dict[str, str]:
    """The fields of a request that must be equal for two requests of the same range."""
    fields = {name: environ[name] for name in environ if name.startswith("HTTP_") and name not in _VARYING}
    scope = re.search(r"Credential=[^,]*", environ.get("HTTP_AUTHORIZATION", ""))
    return {**fields, "path": environ["RAW_URI"], "scope": scope[0] if scope else ""}


def _seconds_from_now(seconds: float) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)


def _refuse_fast(asked: list[dict[str, Any]], status: int) -> Callable[[dict[str, Any]], int | None]:
    """A rule that records requests, and answers those of obstore with a status."""

    def rule(environ: dict[str, Any]) -> int | None:
        asked.append({**environ})
        return status if _is_fast(environ) else None

    return rule


def _write(url: str, name: str = "x.bin", **options: Any) -> Location:
    Location(url).write(name, DATA)
    return Location(url, **options)


@pytest.mark.parametrize(
    ("options", "is_fast"),
    [
        ({}, True),
        ({"anon": True}, True),
        ({"key": "OTHER", "secret": "hidden"}, True),
        ({"key": "OTHER", "secret": "hidden", "token": "session/+="}, True),
        ({"requester_pays": True}, True),
        ({"client_kwargs": {"region_name": "eu-west-1"}}, True),
        ({"config_kwargs": {"s3": {"addressing_style": "path"}}}, True),
        ({"version_aware": True}, False),
        ({"client_kwargs": {"verify": False}}, False),
        ({"config_kwargs": {"read_timeout": 3}}, False),
        ({"s3_additional_kwargs": {"ExpectedBucketOwner": "1"}}, False),
        ({"config_kwargs": {"signature_version": "s3"}}, False),
    ],
)
def test_s3_gets_the_same_requests(
    bucket: str, asked: list[dict[str, Any]], options: dict[str, Any], is_fast: bool
) -> None:
    location = _write(f"{bucket}/deep/a-b_c.d", **options)
    Location(bucket).fs.chmod(f"{bucket}/deep/a-b_c.d/x.bin", "public-read")
    reads = RangeReads(location)
    reads.get("x.bin", 3, 9)
    for start, end in [(5, 5000), (9_000, 11_000)]:
        asked.clear()
        data = bytes(reads.get("x.bin", start, end))
        assert data == location.sent("x.bin", start, end)
        if end <= len(DATA):
            assert data == DATA[start:end]
            assert [_is_fast(environ) for environ in asked] == [is_fast, False]
            assert _comparable(asked[0]) == _comparable(asked[1])


@pytest.mark.parametrize("prefix", ["a b", "50%", "a%20b", "c+d", "e#f", "ü", "a//b", "a/./b", "a?b", "..."])
def test_names_that_need_escaping_are_left_to_the_file_system(
    bucket: str, asked: list[dict[str, Any]], prefix: str
) -> None:
    reads = RangeReads(_write(f"{bucket}/{prefix}"))
    for start, end in RANGES[:2]:
        assert bytes(reads.get("x.bin", start, end)) == DATA[start:end]
    assert any(map(_is_fast, asked)) == (prefix == "...")


def test_an_endpoint_with_a_path_gets_the_same_requests(
    bucket: str, s3: S3Server, asked: list[dict[str, Any]]
) -> None:
    _write(bucket)
    s3.prefix = "/gateway/s3"
    reads = RangeReads(Location(bucket, endpoint_url=f"{s3.url}/gateway/s3"))
    asked.clear()
    for _ in range(2):
        assert bytes(reads.get("x.bin", 10, 20)) == DATA[10:20]
    assert _is_fast(asked[1])
    assert _comparable(asked[0]) == _comparable(asked[1])


@pytest.mark.parametrize(
    ("name", "value", "is_fast"),
    [
        ("AWS_SKIP_SIGNATURE", "true", True),
        ("AWS_ENDPOINT", "http://127.0.0.1:9", True),
        ("AWS_REGION", "eu-west-3", True),
        ("AWS_REQUEST_PAYER", "requester", True),
        ("AWS_UNSIGNED_PAYLOAD", "true", True),
        ("AWS_S3_EXPRESS", "true", True),
        ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true", True),
        ("AWS_TOKEN", "someone's", True),
        ("AWS_SESSION_TOKEN", "mine", True),
        ("AWS_PROXY_URL", "http://127.0.0.1:9", True),
        ("AWS_BUCKET", "other", True),
        ("AWS_SERVER_SIDE_ENCRYPTION", "sse-c", False),
        ("ALL_PROXY", "http://127.0.0.1:9", False),
    ],
)
def test_variables_that_only_obstore_knows_change_nothing(
    bucket: str,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: str,
    is_fast: bool,
) -> None:
    location = _write(bucket)
    monkeypatch.setenv(name, value)
    location.fs.clear_instance_cache()
    reads = RangeReads(Location(bucket))
    asked.clear()
    for _ in range(2):
        assert bytes(reads.get("x.bin", 10, 20)) == DATA[10:20]
    assert [_is_fast(environ) for environ in asked] == [False, is_fast]
    assert _comparable(asked[0]) == _comparable(asked[1])


def test_a_profile_is_respected(
    bucket: str, s3: S3Server, asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write(bucket)
    (tmp_path / "config").write_text(f"[profile lab]\nregion = us-west-2\nendpoint_url = {s3.url}\n")
    (tmp_path / "keys").write_text("[lab]\naws_access_key_id = LABKEY\naws_secret_access_key = LABSECRET\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    for name in ("AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    reads = RangeReads(Location(bucket, profile="lab"))
    asked.clear()
    for _ in range(2):
        assert bytes(reads.get("x.bin", 10, 20)) == DATA[10:20]
    assert _is_fast(asked[1])
    assert _comparable(asked[0]) == _comparable(asked[1])
    assert re.match(r"Credential=LABKEY/\d+/us-west-2/", _comparable(asked[1])["scope"])


def test_expiring_credentials_are_renewed_by_botocore(
    bucket: str, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a role: keys with an expiry date, which botocore replaces before that date."""
    made: list[str] = []

    async def refresh() -> dict[str, str]:
        made.append(f"ROLEKEY{len(made)}")
        keys = {"access_key": made[-1], "secret_key": "hidden", "token": f"token{len(made)}"}
        return {**keys, "expiry_time": _seconds_from_now(1).isoformat()}

    _write(bucket)
    session = aiobotocore.session.AioSession()
    session._credentials = aiobotocore.credentials.AioRefreshableCredentials(
        "FIRSTKEY", "hidden", "token0", _seconds_from_now(3600), refresh, "role"
    )
    monkeypatch.setattr(fast_reads, "CREDENTIALS_LAST", 0)
    reads = RangeReads(Location(bucket, session=session))
    asked.clear()
    for _ in range(2):
        reads.get("x.bin", 10, 20)
    session._credentials._expiry_time = _seconds_from_now(0)
    for _ in range(2):
        assert bytes(reads.get("x.bin", 10, 20)) == DATA[10:20]
    assert [_is_fast(environ) for environ in asked] == [False, True, True, True]
    signed = [
        (_comparable(environ)["scope"].split("/")[0], environ["HTTP_X_AMZ_SECURITY_TOKEN"]) for environ in asked
    ]
    assert signed[:2] == [("Credential=FIRSTKEY", "token0")] * 2
    assert re.fullmatch(r"Credential=ROLEKEY\d+", signed[2][0])
    assert signed[2] != signed[3]


@pytest.fixture
def site(tmp_path: Path, web: WebServer) -> WebServer:
    (tmp_path / "web" / "x.bin").write_bytes(DATA)
    return web


@pytest.mark.parametrize("manner", MANNERS)
def test_web_servers_of_every_kind_give_the_same_bytes(site: WebServer, manner: str) -> None:
    """A server that obstore cannot use gets one request from it."""
    site.manners, site.ranges = MANNERS[manner]
    location = Location(site.url)
    reads = RangeReads(location)
    for start, end in RANGES:
        try:
            expected = location.sent("x.bin", start, end)
        except UserError as error:
            with refused(UserError, None, str(error)):
                reads.get("x.bin", start, end)
        else:
            assert bytes(reads.get("x.bin", start, end)) == expected
    fast = len([agent for agent in site.agents if agent.startswith("object_store")])
    assert fast > 2 if site.ranges else fast == (2 if "redirect" in site.manners else 1)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        ("?signature=a%2Fb", {}),
        ("", {"headers": {"Authorization": "Bearer x"}}),
        ("", {"client_kwargs": {"headers": {"X-Lab": "1"}}}),
        ("/a%20b", {}),
        ("/a b", {}),
    ],
)
def test_web_requests_with_queries_headers_or_escapes_are_left_to_the_file_system(
    site: WebServer, tmp_path: Path, suffix: str, options: dict[str, Any]
) -> None:
    (tmp_path / "web" / "a b").mkdir()
    (tmp_path / "web" / "a b" / "x.bin").write_bytes(DATA)
    reads = RangeReads(Location(site.url + suffix, **options))
    for start, end in RANGES:
        assert bytes(reads.get("x.bin", start, end)) == DATA[start:end]
    assert not [agent for agent in site.agents if agent.startswith("object_store")]


def test_a_pinned_file_is_left_to_the_file_system(site: WebServer) -> None:
    site.etag = lambda: '"1"'
    location = Location(site.url)
    reads = RangeReads(location)
    location.pin("x.bin")
    for start, end in RANGES:
        assert bytes(reads.get("x.bin", start, end)) == DATA[start:end]
    assert not [agent for agent in site.agents if agent.startswith("object_store")]


@pytest.fixture(params=["s3", "http"])
def reads(request: pytest.FixtureRequest) -> RangeReads:
    """Reads from a server of either kind, after one request."""
    url = request.getfixturevalue("bucket") if request.param == "s3" else request.getfixturevalue("site").url
    reads = RangeReads(_write(url) if request.param == "s3" else Location(url))
    assert bytes(reads.get("x.bin", 1, 5)) == DATA[1:5]
    return reads


@pytest.fixture
def server(reads: RangeReads, request: pytest.FixtureRequest) -> S3Server | WebServer:
    is_s3 = reads._location.url.startswith("s3://")
    found: S3Server | WebServer = request.getfixturevalue("s3" if is_s3 else "site")
    found.requests.clear()
    return found


def _first(status: int, times: int) -> Callable[[str, str], int | None]:
    left = [status] * times
    return lambda method, path: left.pop() if left else None


@pytest.mark.parametrize("status", [429, 500, 503])
def test_transient_failures_count_as_attempts(
    server: S3Server | WebServer, reads: RangeReads, quick: list[float], status: int
) -> None:
    server.fault = _first(status, 2)
    assert bytes(reads.get("x.bin", 5, 50)) == DATA[5:50]
    assert len(server.requests) == 3
    assert len(quick) == 2
    server.fault = _first(status, PLENTY)
    server.requests.clear()
    with refused(DatamergeError, None, "x.bin", status):
        reads.get("x.bin", 5, 50)
    assert len(server.requests) == ATTEMPTS


def test_a_missing_file_is_requested_once(server: S3Server | WebServer, reads: RangeReads) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*/y\.bin"):
        reads.get("y.bin", 5, 50)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [400, 401, 403])
def test_refusals_are_the_users_error(server: S3Server | WebServer, reads: RangeReads, status: int) -> None:
    server.fault = _first(status, PLENTY)
    for _ in range(2):
        with refused(UserError, None, "x.bin", status):
            reads.get("x.bin", 5, 50)
    assert len(server.requests) <= 4


def test_obstore_is_not_used_again_where_only_it_is_refused(bucket: str, s3: S3Server, asked: list[Any]) -> None:
    reads = RangeReads(_write(bucket))
    reads.get("x.bin", 1, 5)
    s3.rule = _refuse_fast(asked, 403)
    for _ in range(5):
        assert bytes(reads.get("x.bin", 5, 50)) == DATA[5:50]
    assert sum(map(_is_fast, asked)) == 1


def test_obstore_pauses_where_only_it_fails(
    bucket: str, s3: S3Server, asked: list[Any], quick: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = RangeReads(_write(bucket))
    reads.get("x.bin", 1, 5)
    recording = s3.rule
    asked.clear()
    s3.rule = _refuse_fast(asked, 503)
    for _ in range(FAILURES + 5):
        assert bytes(reads.get("x.bin", 5, 50)) == DATA[5:50]
    assert sum(map(_is_fast, asked)) == FAILURES
    monkeypatch.setattr(reads, "_rest_until", 0.0)
    s3.rule = recording
    asked.clear()
    for _ in range(FAILURES):
        assert bytes(reads.get("x.bin", 5, 50)) == DATA[5:50]
    assert sum(map(_is_fast, asked)) == FAILURES


def test_a_forked_process_reads_without_obstore(site: WebServer) -> None:
    code = f"""
import os
from storage_schemas import Location
from storage_schemas.access.fetchers import fetcher_of
location = Location({site.url!r})
for _ in range(2):
    fetcher_of(location).read("x.bin", 5, 50)
child = os.fork()
if not child:
    os._exit(fetcher_of(location).read("x.bin", 5, 50).tobytes() != {DATA[5:50]!r})
assert os.waitpid(child, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
    assert [agent.startswith("object_store") for agent in site.agents] == [False, True, False]


def test_reads_work_without_obstore(site: WebServer) -> None:
    code = f"""
import sys
sys.modules["obstore"] = None
from storage_schemas import Location
from storage_schemas.access.fetchers import fetcher_of
for _ in range(2):
    assert fetcher_of(Location({site.url!r})).read("x.bin", 5, 50).tobytes() == {DATA[5:50]!r}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env={**os.environ})
    assert len(site.agents) == 2
    assert not [agent for agent in site.agents if agent.startswith("object_store")]
