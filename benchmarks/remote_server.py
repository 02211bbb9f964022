"""A file server with adjustable latency and rate, in a separate process: HTTP with ranges, and S3 for reading.

    python -m benchmarks.remote_server FOLDER --latency 0.02 --rate 100e6

Every request waits `latency` seconds before its answer begins; the kernel paces each connection to `rate` bytes a
second (SO_MAX_PACING_RATE, Linux) and sends files itself (sendfile), so that the server takes little of the CPU that
it shares with its client: about 0.1 ms per request. `total` limits all connections together, which share it equally.
The first line of its output is its URL.

As S3 (path style, signatures are ignored) each folder below FOLDER is a bucket, with GetObject (ranges too),
HeadObject and ListObjectsV2. The same URLs work as plain HTTP.

`/-/log` returns the requests since its last call, `/-/settings?rate=5e7&fail=0.05` changes settings.
"""

from __future__ import annotations

import asyncio
import json
import mimetypes
import os
import random
import re
import socket
import struct
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit
from xml.sax.saxutils import escape

import click

PACING = 47  # SO_MAX_PACING_RATE, which Python's socket module has no name for
UNPACED = 2**64 - 1
LISTED = 1000  # keys of an answer to ListObjectsV2
REASONS = {200: "OK", 206: "Partial Content", 404: "Not Found", 416: "Range Not Satisfiable", 503: "Slow Down"}


@dataclass
class Settings:
    """Simulated distance and faults of the server.

    Attributes:
        latency: seconds from a request to the first byte of its answer.
        rate: bytes per second of a connection; 0 for no limit.
        total: bytes per second of all connections; 0 for no limit.
        fail: fraction of requests that are answered with 503.
        stall: seconds for which each of the next `stalls` answers pauses half-way.
        stalls: number of answers that will pause.
    """

    latency: float = 0.0
    rate: float = 0.0
    total: float = 0.0
    fail: float = 0.0
    stall: float = 0.0
    stalls: int = 0


@dataclass(frozen=True)
class Request:
    """An answered request.

    Attributes:
        path: path and query of the request.
        start, end: range of the file that was to be sent; 0 and 0 for an answer without a body.
        status: HTTP status.
        began, ended: seconds since the server started.
    """

    method: str
    path: str
    start: int
    end: int
    status: int
    began: float
    ended: float


class Server:
    """Serves the files below a folder."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder.resolve(), settings
        self.log: list[Request] = []
        self._sending: set[socket.socket] = set()
        self._random = random.Random(0)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer the requests of one connection."""
        writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(ConnectionError, asyncio.IncompleteReadError):  # clients hang up when they have enough
            while head := await reader.readuntil(b"\r\n\r\n"):
                method, target, headers = _parsed(head)
                await reader.readexactly(int(headers.get("content-length", 0)))
                await self._one(method, target, headers, writer)
        with suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()

    async def _one(self, method: str, target: str, headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        url, began = urlsplit(target), _now()
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        if url.path.startswith("/-/"):
            self._send(writer, 200, self._control(url.path, query), "application/json")
            return
        await asyncio.sleep(self.settings.latency)
        path = (self.folder / unquote(url.path).lstrip("/")).resolve()
        start = end = 0
        if self._random.random() < self.settings.fail:
            status = 503
            self._send(writer, status, _problem("SlowDown"))
        elif "list-type" in query and path.is_dir():
            status = 200
            self._send(writer, status, _listing(path, query))
        elif not path.is_relative_to(self.folder) or not path.is_file():
            status = 404
            self._send(writer, status, _problem("NoSuchKey") if method == "GET" else b"")
        else:
            status, start, end = await self._file(path, method, headers.get("range"), writer)
        self.log.append(Request(method, target, start, end, status, began, _now()))

    async def _file(
        self, path: Path, method: str, span: str | None, writer: asyncio.StreamWriter
    ) -> tuple[int, int, int]:
        found = path.stat()
        start, end, status = 0, found.st_size, 200
        if span is not None:
            start, end = _bounds(span, found.st_size)
            status = 206 if start < end else 416
        lines = {
            "Content-Type": mimetypes.guess_type(path.name)[0] or "binary/octet-stream",
            "ETag": f'"{found.st_size:x}-{found.st_mtime_ns:x}"',
            "Last-Modified": formatdate(found.st_mtime, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if status == 416:
            writer.write(_head(416, 0, {"Content-Range": f"bytes */{found.st_size}"}))
            return 416, 0, 0
        if status == 206:
            lines["Content-Range"] = f"bytes {start}-{end - 1}/{found.st_size}"
        writer.write(_head(status, end - start, lines))
        if method == "HEAD" or start == end:
            return status, 0, 0
        with path.open("rb") as file:
            await self._sent(file, start, end, writer)
        return status, start, end

    async def _sent(self, file: Any, start: int, end: int, writer: asyncio.StreamWriter) -> None:
        """Send a part of a file at the rate of the connection."""
        connection, loop = writer.transport.get_extra_info("socket"), asyncio.get_running_loop()
        self._sending.add(connection)
        try:
            self._pace()
            if self.settings.stalls:
                self.settings.stalls -= 1
                half = (end - start) // 2
                if half:
                    await loop.sendfile(writer.transport, file, start, half)
                await asyncio.sleep(self.settings.stall)
                start += half
            await loop.sendfile(writer.transport, file, start, end - start)
        finally:
            self._sending.discard(connection)
            self._pace()

    def _pace(self) -> None:
        """Set the rate of every sending connection."""
        rates: list[float] = [self.settings.rate or UNPACED]
        if self.settings.total and self._sending:
            rates.append(self.settings.total / len(self._sending))
        for connection in self._sending:
            with suppress(OSError):  # the connection was closed
                connection.setsockopt(socket.SOL_SOCKET, PACING, struct.pack("Q", int(min(rates))))

    def _control(self, path: str, query: dict[str, str]) -> bytes:
        if path == "/-/settings":
            for field in fields(Settings):
                if field.name in query:
                    setattr(self.settings, field.name, (int if field.name == "stalls" else float)(query[field.name]))
            self._pace()
            return json.dumps(asdict(self.settings)).encode()
        log, self.log = self.log, []
        return json.dumps({"requests": [list(vars(one).values()) for one in log], "cpu": _cpu()}).encode()

    @staticmethod
    def _send(writer: asyncio.StreamWriter, status: int, body: bytes, kind: str = "application/xml") -> None:
        writer.write(_head(status, len(body), {"Content-Type": kind}) + body)


def _now() -> float:
    return asyncio.get_running_loop().time()


def _cpu() -> float:
    times = os.times()
    return times.user + times.system


def _parsed(head: bytes) -> tuple[str, str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    pairs = (line.partition(":") for line in lines if line)
    return method, target, {name.lower(): value.strip() for name, _, value in pairs}


def _head(status: int, length: int, lines: dict[str, str]) -> bytes:
    text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Length: {length}\r\n{text}\r\n".encode("latin-1")


def _bounds(span: str, size: int) -> tuple[int, int]:
    """Start and end of a single range; bytes=-n is the last n bytes."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", span)
    if found is None or not any(found.groups()):
        return 0, size
    first, last = found.groups()
    if not first:
        return max(0, size - int(last)), size
    return int(first), min(size, int(last) + 1 if last else size)


def _problem(code: str) -> bytes:
    return (
        f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>{code}</Message></Error>'.encode()
    )


def _listing(bucket: Path, query: dict[str, str]) -> bytes:
    """Answer to ListObjectsV2 for a bucket; the continuation token is the last key that was listed."""
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    after = query.get("continuation-token") or query.get("start-after", "")
    most = min(LISTED, int(query.get("max-keys", LISTED)))
    files = {path.relative_to(bucket).as_posix(): path for path in bucket.rglob("*") if path.is_file()}
    names: dict[str, Path | None] = {}
    for key in sorted(key for key in files if key.startswith(prefix)):
        rest, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
        names[prefix + rest + found if found else key] = None if found else files[key]
    listed = [name for name in names if name > after]
    rows = []
    for name in listed[:most]:
        path = names[name]
        if path is None:
            rows.append(f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>")
            continue
        found_at = path.stat()
        when = formatdate(found_at.st_mtime, usegmt=True)
        rows.append(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{when}</LastModified><Size>{found_at.st_size}</Size>"
            f"<ETag>&quot;{found_at.st_size:x}-{found_at.st_mtime_ns:x}&quot;</ETag>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )
    more = len(listed) > most
    token = f"<NextContinuationToken>{escape(listed[most - 1])}</NextContinuationToken>" if more else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{escape(bucket.name)}</Name><Prefix>{escape(prefix)}</Prefix><MaxKeys>{most}</MaxKeys>"
        f"<KeyCount>{len(rows)}</KeyCount><IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows)}"
        "</ListBucketResult>"
    ).encode()


@dataclass(frozen=True)
class Remote:
    """A server that runs in another process."""

    url: str

    def log(self) -> tuple[list[Request], float]:
        """Requests since the last call, and CPU seconds of the server since it started."""
        found = self._asked("log")
        return [Request(*row) for row in found["requests"]], found["cpu"]

    def set(self, **settings: float) -> None:
        """Change settings of the running server."""
        self._asked("settings?" + "&".join(f"{name}={value}" for name, value in settings.items()))

    def _asked(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self.url}/-/{path}") as answer:
            return json.load(answer)


@contextmanager
def running(folder: Path, **settings: float) -> Iterator[Remote]:
    """Start a server of a folder in a separate process."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.remote_server", str(folder), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield Remote(process.stdout.readline().strip())
        finally:
            process.terminate()


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--port", default=0, help="Port; a free one by default.")
@click.option("--latency", default=0.0, show_default=True, help="Seconds before an answer.")
@click.option("--rate", default=0.0, show_default=True, help="Bytes per second of a connection; 0: no limit.")
@click.option("--total", default=0.0, show_default=True, help="Bytes per second of all connections; 0: no limit.")
@click.option("--fail", default=0.0, show_default=True, help="Fraction of requests that are answered with 503.")
def main(folder: Path, port: int, **settings: Any) -> None:
    """Serve the files below FOLDER."""
    asyncio.run(_serve(folder, port, Settings(**settings)))


async def _serve(folder: Path, port: int, settings: Settings) -> None:
    server = await asyncio.start_server(Server(folder, settings).answer, "127.0.0.1", port, backlog=1024)
    click.echo(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    sys.stdout.flush()
    await server.serve_forever()


if __name__ == "__main__":
    main()
