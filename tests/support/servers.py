"""Real servers on this machine, in threads: S3 (moto) and HTTP, with a log of requests and faults on demand.

A test folder that needs them imports the fixtures in its conftest.
"""

from __future__ import annotations

import functools
import gzip
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import uuid4

import fsspec
import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

# A fault answers a request (method, path) with this status, or lets it through with None.
Fault = Callable[[str, str], int | None]

# Ways in which a web server may serve a file: its manners, and whether it supports ranges.
MANNERS: dict[str, tuple[set[str], bool]] = {
    "ranges": (set(), True),
    "no ranges": (set(), False),
    "redirect": ({"redirect"}, True),
    "redirect without ranges": ({"redirect"}, False),
    "no length": ({"chunked"}, True),
    "no length, no ranges": ({"chunked"}, False),
    "gzip when asked": ({"gzip when asked"}, True),
    "gzip, no ranges": ({"gzip"}, False),
    "gzip, no length": ({"gzip", "chunked"}, False),
}


class QuietS3(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class S3Server:
    """Moto behind a WSGI layer that logs and fails requests.

    Attributes:
        rule: like `fault`, but for the WSGI environment of a request, which has its headers.
        prefix: prefix of all paths, like that of a gateway with S3 below a path.
    """

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.requests: list[tuple[str, str, str]] = []
        self.fault: Fault | None = None
        self.rule: Callable[[dict[str, Any]], int | None] | None = None
        self.prefix = ""
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=QuietS3)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("QUERY_STRING", "")))
        status = self.fault(method, path) if self.fault else None
        if status is None and self.rule is not None:
            status = self.rule(environ)
        if self.prefix and not path.startswith(f"{self.prefix}/"):
            status = 404
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Fault", [("Content-Type", "application/xml"), ("Content-Length", "0")])
            return [b""]
        if self.prefix:
            environ["PATH_INFO"] = path.removeprefix(self.prefix)
            for name in ("RAW_URI", "REQUEST_URI"):
                environ[name] = environ[name].replace(self.prefix, "", 1)
        result: Iterable[bytes] = self._application(environ, start_response)
        return result

    def listings(self) -> list[str]:
        """Paths that were listed since the log was last cleared."""
        return [path for method, path, query in self.requests if method == "GET" and "list-type" in parse_qs(query)]

    @contextmanager
    def running(self) -> Iterator[S3Server]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        yield self
        self._server.shutdown()
        thread.join()
        self._server.server_close()


class WebHandler(SimpleHTTPRequestHandler):
    """Serves the files of a folder with the manners of the server; it refuses listings."""

    server: WebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # Nagle's algorithm delays every answer by 40 ms

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path, self.headers.get("Range", "")))
        self.server.agents.append(self.headers.get("User-Agent", ""))
        status = self.server.fault("GET", self.path) if self.server.fault else None
        file = Path(self.translate_path(self.path))
        if status is not None and self.server.retry_after:
            self.send_response(status)
            self.send_header("Retry-After", self.server.retry_after)
            self._end()
        elif status is not None:
            self.send_error(status)
        elif "redirect" in self.server.manners and not self.path.startswith("/there/"):
            self.send_response(302)
            self.send_header("Location", f"/there{self.path}")
            self._end()
        elif not file.is_file():
            super().do_GET()
        else:
            self._send(file.read_bytes())

    def translate_path(self, path: str) -> str:
        return super().translate_path(path.removeprefix("/there"))

    def _send(self, data: bytes) -> None:
        manners, span = self.server.manners, self.headers.get("Range")
        asked = "gzip" in self.headers.get("Accept-Encoding", "")
        is_packed = "gzip" in manners or (asked and "gzip when asked" in manners)
        if is_packed:
            data = gzip.compress(data)
        if span and self.server.ranges:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last or len(data)), len(data) - 1)
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self._end()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
            data = data[start : end + 1]
        else:
            self.send_response(200)
        if is_packed:
            self.send_header("Content-Encoding", "gzip")
        if self.server.etag is not None:
            self.send_header("ETag", self.server.etag())
        if "chunked" in manners:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data) if data else b"0\r\n\r\n")
        else:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def _end(self) -> None:
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, ""))
        super().do_HEAD()

    def list_directory(self, path: Any) -> None:
        self.server.listed.append(str(path))
        self.send_error(403)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """An HTTP server over a folder.

    Attributes:
        ranges: whether it supports range requests.
        manners: any of `redirect`, `chunked` (no Content-Length), `gzip` (always), `gzip when asked`.
        etag: returns the ETag for an answer.
        retry_after: sent with the status of a fault.
        agents: the User-Agent of each GET.
    """

    daemon_threads = True
    request_queue_size = 128  # connections that may wait to be accepted; further ones would be retried after seconds

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(WebHandler, directory=str(folder)))
        self.requests: list[tuple[str, str, str]] = []
        self.agents: list[str] = []
        self.listed: list[str] = []
        self.fault: Fault | None = None
        self.ranges = ranges
        self.manners: set[str] = set()
        self.etag: Callable[[], str] | None = None
        self.retry_after = ""
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def fetched(self) -> list[str]:
        """Paths whose content, not only their size, was requested since the log was last cleared."""
        return [path for method, path, span in self.requests if method == "GET" and span != "bytes=0-0"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors: clients hang up when they have read enough."""

    @contextmanager
    def running(self) -> Iterator[WebServer]:
        thread = threading.Thread(target=self.serve_forever, daemon=True)
        thread.start()
        yield self
        self.shutdown()
        thread.join()
        self.server_close()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server().running() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, with its address and credentials in the environment variables that a user would set."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTKEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    # Botocore's own retries would hide ours, and wait.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_server.fault = s3_server.rule = None
    s3_server.prefix = ""
    # A process keeps its connections, including those to the server of another test.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    return s3_server


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """URL of a new, empty bucket."""
    url = f"s3://bucket-{uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(url)
    s3.requests.clear()
    return url


@pytest.fixture
def web(tmp_path: Path) -> Iterator[WebServer]:
    """A server of the folder `tmp_path / "web"` that supports ranges."""
    (tmp_path / "web").mkdir()
    with WebServer(tmp_path / "web").running() as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between retries, recorded instead of slept."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits
