"""Real servers on this machine, in threads: S3 (moto) and HTTP, with a log of requests and faults on demand.

A folder of tests that needs them imports the fixtures in its conftest.
"""

from __future__ import annotations

import functools
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


class QuietS3(WSGIRequestHandler):
    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        pass


class S3Server:
    """Moto behind a WSGI layer that logs and fails requests."""

    def __init__(self) -> None:
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

        self.requests: list[tuple[str, str, str]] = []
        self.fault: Fault | None = None
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self, threaded=True, request_handler=QuietS3)
        self.url = f"http://127.0.0.1:{self._server.port}"

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        self.requests.append((method, path, environ.get("QUERY_STRING", "")))
        status = self.fault(method, path) if self.fault else None
        if status is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Fault", [("Content-Type", "application/xml"), ("Content-Length", "0")])
            return [b""]
        result: Iterable[bytes] = self._application(environ, start_response)
        return result

    def listings(self) -> list[str]:
        """Paths that were listed since the log was emptied."""
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
    """Files of a folder, with ranges unless the server is told to ignore them, and no listings."""

    server: WebServer

    def do_GET(self) -> None:
        self.server.requests.append(("GET", self.path, self.headers.get("Range", "")))
        status = self.server.fault("GET", self.path) if self.server.fault else None
        if status is not None:
            self.send_error(status)
            return
        span = self.headers.get("Range")
        file = Path(self.translate_path(self.path))
        if not span or not self.server.ranges or not file.is_file():
            super().do_GET()
            return
        data = file.read_bytes()
        first, _, last = span.removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last or len(data)), len(data) - 1)
        if start >= len(data):
            self.send_error(416)
            return
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{end}/{len(data)}")
        self.send_header("Content-Length", str(end + 1 - start))
        self.end_headers()
        self.wfile.write(data[start : end + 1])

    def do_HEAD(self) -> None:
        self.server.requests.append(("HEAD", self.path, ""))
        super().do_HEAD()

    def list_directory(self, path: Any) -> None:
        self.server.listed.append(str(path))
        self.send_error(403)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """An HTTP server over a folder."""

    daemon_threads = True

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(WebHandler, directory=str(folder)))
        self.requests: list[tuple[str, str, str]] = []
        self.listed: list[str] = []
        self.fault: Fault | None = None
        self.ranges = ranges
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

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
    """The server, found and entered by what a user would set in the environment."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "TESTKEYID")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "verysecret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    # Botocore's own retries would hide ours, and wait.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3_server.fault = None
    # Connections are kept for the life of a process, also those to the server of another test.
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
    """A server of the folder `tmp_path / "web"` that knows ranges."""
    (tmp_path / "web").mkdir()
    with WebServer(tmp_path / "web").running() as server:
        yield server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between retries, which are not waited for."""
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits
