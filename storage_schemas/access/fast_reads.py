"""Fast range reads through obstore, where it would make the same request as the fsspec file system.

obstore only serves the successful case. When it fails, the rest of the range is read through `Location.sent`, which
has the retries, the error messages and the tolerance of unusual servers; a transient failure of obstore counts as the
first attempt. The first range of a location always goes through the file system. On S3 that request is the template
for obstore's: instead of translating s3fs's options, we copy the request that botocore made from the options, the
environment and its configuration files. Credentials come from botocore's client for as long as the store is used.

obstore is not used where its request might differ: options that change requests, proxies, signed URLs, names that
need escaping, pinned files, and forked processes.
"""

from __future__ import annotations

import datetime
import errno
import importlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import fsspec

from storage_schemas.access.location import Location
from storage_schemas.access.retries import backoff, is_transient

if TYPE_CHECKING:
    from obstore import GetResult
    from obstore.store import ClientConfig, S3Credential

Buffer = bytes | memoryview
Read = Callable[[str, int, int], Iterator[Buffer]]  # (path in the location, start, end) → bytes [start, end)
# (location, path, first request) → (its bytes, a function that makes a reader for later requests, or None).
Learn = Callable[[Location, str, Callable[[], bytes]], tuple[bytes, Callable[[], Read | None]]]

PIECE = 2**20  # bytes; larger answers are handed on in pieces of at least as many, but for the last
# After this many consecutive failures where the file system succeeded, obstore pauses; each pause is twice as long.
FAILURES = 4
FIRST_REST, LONGEST_REST = 60.0, 3600.0
# Seconds. obstore renews credentials five minutes before they expire, so it asks for these every minute.
CREDENTIALS_LAST = 360
# Paths in which no client escapes a character or normalises a part.
_PLAIN = re.compile(r"(?:https?://[\w.-]+(?::\d+)?/)?(?!(?:.*/)?\.{0,2}(?:/|$))[\w.~/-]+", re.ASCII)
_SIGNED = re.compile(r"AWS4-HMAC-SHA256 Credential=([^/,]+)/\d+/([^/,]+)/s3/aws4_request,.*")
# Options of s3fs that are visible in a request or do not affect it.
_S3_OPTIONS = {
    *("anon", "key", "secret", "token", "username", "password", "profile", "session", "endpoint_url", "use_ssl"),
    *("requester_pays", "cache_regions", "client_kwargs", "config_kwargs", "use_listings_cache"),
}
_CLIENT_OPTIONS = {"endpoint_url", "region_name", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"}
_CONFIG_OPTIONS = {"retries", "s3", "signature_version", "region_name", "max_pool_connections"}
_S3_HEADERS = {
    *("range", "user-agent", "authorization", "x-amz-date", "x-amz-content-sha256", "x-amz-security-token"),
    *("x-amz-checksum-mode", "x-amz-request-payer", "amz-sdk-invocation-id", "amz-sdk-request"),
}


class _Failed(Exception):
    """A failed or unusable answer.

    Attributes:
        status: HTTP status of the answer; None if unknown.
    """

    def __init__(self, status: int | None = None) -> None:
        super().__init__()
        self.status = status


class RangeReads:
    """Reads ranges of the files of one remote location, through obstore where possible. Thread-safe."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self._learn = _learner(location)
        self._read: Read | None = None
        self._learning = threading.Lock()
        self._failures = 0  # consecutive
        self._rest, self._rest_until = FIRST_REST, 0.0

    def get(self, path: str, start: int, end: int, most: int | None = None) -> Buffer:
        """Bytes [start, end) of a file; same result and errors as `Location.sent`."""
        pieces = list(self.pieces(path, start, end, most))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pieces(self, path: str, start: int, end: int, most: int | None = None) -> Iterator[Buffer]:
        """Same as `get`, piece by piece as they come."""
        location, learn, read = self._location, self._learn, self._read
        if (
            learn is None
            or _FORKED
            or start >= end
            or path in location._versions
            or not _PLAIN.fullmatch(location.path(path))
            or time.monotonic() < self._rest_until
        ):
            yield location.sent(path, start, end, most)
            return
        if read is None:
            yield self._first(learn, path, lambda: location.sent(path, start, end, most))
            return
        delays, at = backoff(), start
        try:
            for piece in _attempt(read, path, start, end):
                at += len(piece)
                yield piece
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, "no such file", f"{location.url}/{path}") from None
        except _Failed as failure:
            may_pass = is_transient(failure)
        else:
            self._failures, self._rest = 0, FIRST_REST
            return
        if may_pass:
            time.sleep(next(delays))
        data = location.sent(path, at, end, most, delays)
        if not may_pass and len(data) == end - at:
            self._learn = None
        elif may_pass:
            self._count_failure()
        yield data

    def _first(self, learn: Learn, path: str, request: Callable[[], bytes]) -> bytes:
        """Make a request through the file system; one thread at a time learns from its own."""
        if not self._learning.acquire(blocking=False):
            return request()
        try:
            first, make_reader = learn(self._location, path, request)
            with suppress(Exception):
                self._read = make_reader()
            if self._read is None:
                self._learn = None
            return first
        finally:
            self._learning.release()

    def _count_failure(self) -> None:
        self._failures += 1
        if self._failures >= FAILURES and time.monotonic() >= self._rest_until:
            self._rest_until = time.monotonic() + self._rest
            self._rest = min(LONGEST_REST, 2 * self._rest)


def _attempt(read: Read, path: str, start: int, end: int) -> Iterator[Buffer]:
    """All bytes of a range, piece by piece.

    Raises:
        FileNotFoundError: no such file.
        _Failed: any other failure, or another number of bytes than requested.
    """
    pieces, at = read(path, start, end), start
    while (piece := _next(pieces)) is not None:
        at += len(piece)
        if at > end:
            break
        yield piece
    if at != end:
        raise _Failed


def _next(pieces: Iterator[Buffer]) -> Buffer | None:
    try:
        return next(pieces, None)
    except (FileNotFoundError, _Failed, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        text = str(error)
        if (status := re.search(r"status code: (\d{3})", text)) is not None:
            raise _Failed(int(status[1])) from None
        if "HTTP error" in text and "certificate" not in text:
            raise _Failed from ConnectionError()
        raise _Failed from None


def _pieces(answer: GetResult, size: int) -> Iterator[Buffer]:
    """The bytes of an answer; collecting megabytes before they are written would cost more than writing them."""
    if size <= PIECE:
        yield memoryview(answer.bytes())
    else:
        for piece in answer.stream(min_chunk_size=PIECE):
            yield memoryview(piece)


def _learner(location: Location) -> Learn | None:
    """How to derive obstore's requests from the first one; None where obstore must not be used."""
    try:
        importlib.import_module("obstore.store")
    except ImportError:
        return None
    names = {name.upper() for name, value in os.environ.items() if value}
    if names & {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"}:
        return None
    options: Mapping[str, Any] = location.fs.storage_options
    if location.is_read_only:
        return _learn_web if set(options) <= {"use_listings_cache"} else None
    if (
        type(location.fs).__module__ != "s3fs.core"
        or not re.fullmatch(r"[a-z0-9][a-z0-9.-]+[a-z0-9]", str(location.root).partition("/")[0])
        or not set(options) <= _S3_OPTIONS
        or not set(options.get("client_kwargs") or {}) <= _CLIENT_OPTIONS
        or not set(options.get("config_kwargs") or {}) <= _CONFIG_OPTIONS
        or any(name.startswith(("AWS_SSE_", "AWS_SERVER_SIDE_")) for name in names)  # obstore would follow them
    ):
        return None
    return _learn_s3


def _client_options(url: str) -> ClientConfig:
    # As in `web`: a large answer as a whole may take long.
    return {
        "allow_http": url.startswith("http://"),
        "connect_timeout": "15s",
        "read_timeout": "30s",
        "timeout": "3600s",
    }


def _learn_web(location: Location, path: str, first: Callable[[], bytes]) -> tuple[bytes, Callable[[], Read | None]]:
    return first(), lambda: _web_read(str(location.root))


def _web_read(url: str) -> Read:
    import obstore
    from obstore.store import HTTPStore

    store = HTTPStore(
        url,
        client_options={**_client_options(url), "default_headers": {"Accept-Encoding": "identity"}},
        retry_config={"max_retries": 0},
    )

    def read(path: str, start: int, end: int) -> Iterator[Buffer]:
        answer = obstore.get(store, path, options={"range": (start, end)})
        if answer.attributes.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _Failed
        yield from _pieces(answer, end - start)

    return read


def _learn_s3(location: Location, path: str, first: Callable[[], bytes]) -> tuple[bytes, Callable[[], Read | None]]:
    fs = location.fs
    bucket, _, key = location.path(path).partition("/")
    seen: list[tuple[str, dict[str, str]]] = []

    def note(request: Any, **_: object) -> None:
        host = urlsplit(request.url).netloc
        if request.url.endswith(f"/{key}" if host.startswith(f"{bucket}.") else f"/{bucket}/{key}"):
            texts = {name: v.decode("latin-1") if isinstance(v, bytes) else v for name, v in request.headers.items()}
            seen.append((request.url.removesuffix(f"/{key}"), {name.lower(): text for name, text in texts.items()}))

    async def listen(is_begin: bool) -> None:
        events = (await _client(fs, bucket)).meta.events
        (events.register if is_begin else events.unregister)("before-send.s3.GetObject", note)

    with suppress(Exception):  # the request itself raises a better error
        fsspec.asyn.sync(fs.loop, listen, True)
    try:
        data = first()
    finally:
        with suppress(Exception):
            fsspec.asyn.sync(fs.loop, listen, False)
    return data, lambda: _s3_read(fs, bucket, key.removesuffix(path), *seen[-1]) if seen else None


def _s3_read(fs: Any, bucket: str, folder: str, base: str, headers: Mapping[str, str]) -> Read | None:
    """A reader whose requests equal one that s3fs made; None where they would differ.

    Args:
        fs: the file system of s3fs.
        bucket: name of the bucket.
        folder: prefix of the location in the bucket, with a trailing slash.
        base: URL of the bucket, which is in its path or in its host.
        headers: of the request of s3fs.
    """
    import obstore
    from obstore.store import S3Store

    authority = headers.get("authorization")
    signed = None if authority is None else _SIGNED.fullmatch(authority)
    credentials = None if signed is None else _Credentials(fs, bucket)
    if (
        not set(headers) <= _S3_HEADERS
        or headers.get("x-amz-request-payer", "requester") != "requester"
        or (authority is not None and signed is None)
        or (signed and credentials and not credentials.are(signed[1], headers.get("x-amz-security-token")))
        # obstore would also trust its own certificates.
        or (base.startswith("https://") and fs.session.get_config_variable("ca_bundle"))
    ):
        return None
    store = S3Store(
        bucket,
        # Set everything that obstore would otherwise take from the environment.
        endpoint=base,
        aws_endpoint_url_s3=base,
        virtual_hosted_style_request=True,  # `endpoint` contains the bucket already, in its host or its path
        region=signed[2] if signed else "us-east-1",
        skip_signature=signed is None,
        request_payer="x-amz-request-payer" in headers,
        unsigned_payload=False,
        s3_express=False,
        client_options=_client_options(base),
        retry_config={"max_retries": 0},
        credential_provider=credentials,
    )

    def read(path: str, start: int, end: int) -> Iterator[Buffer]:
        yield from _pieces(obstore.get(store, folder + path, options={"range": (start, end)}), end - start)

    return read


async def _client(fs: Any, bucket: str) -> Any:
    """The botocore client of s3fs for a bucket."""
    await fs.set_session()
    return await fs.get_s3(bucket)


class _Credentials:
    """Credential provider for obstore: the current credentials of botocore's client, from whatever source."""

    def __init__(self, fs: Any, bucket: str) -> None:
        self._fs, self._bucket = fs, bucket

    def __call__(self) -> S3Credential:
        found, may_expire = fsspec.asyn.sync(self._fs.loop, self._frozen)
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=CREDENTIALS_LAST)
        return {
            "access_key_id": found.access_key,
            "secret_access_key": found.secret_key,
            "token": found.token,
            "expires_at": until if may_expire else None,
        }

    async def _frozen(self) -> tuple[Any, bool]:
        found = (await _client(self._fs, self._bucket))._request_signer._credentials
        return await found.get_frozen_credentials(), hasattr(found, "refresh_needed")

    def are(self, key: str, token: str | None) -> bool:
        """Whether a request with this access key and session token was signed with the current credentials."""
        found = self()
        return (found["access_key_id"], found.get("token")) == (key, token)


_FORKED = False


def _after_fork() -> None:
    """Disable obstore in a child process, where it would wait for threads that only its parent has."""
    global _FORKED
    _FORKED = "obstore" in sys.modules


os.register_at_fork(after_in_child=_after_fork)
