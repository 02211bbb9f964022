"""A file system for web servers that checks every answer.

Servers differ: some support neither ranges nor HEAD and answer a range with the whole file (status 200 in place of
206); some compress bodies, whose ranges and lengths are then those of the compressed bytes; some redirect; and a file
may change between two requests.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

from storage_schemas.access.explaining import ChangedFile, NoRanges, Refused

Headers = Any  # aiohttp's mapping with case-insensitive keys
# Time-outs for connecting and for each piece of an answer; a large answer as a whole may take long.
CONNECT_SECONDS, PIECE_SECONDS = 15, 30
# Characters that a URL may contain unescaped; "%" is handled separately.
_LEGAL = "%/:=&?~+!$,;'@()*[]-._"


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """fsspec's http(s) file system with checked answers."""

    def __init__(self, client_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        own = dict(client_kwargs or {})
        # Ranges and lengths must be those of the uncompressed file.
        own["headers"] = {"Accept-Encoding": "identity", **dict(own.get("headers") or {})}
        own.setdefault(
            "timeout", aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=PIECE_SECONDS)
        )
        # The signature of a redirect may depend on its exact spelling.
        own.setdefault("requote_redirect_url", False)
        super().__init__(client_kwargs=own, **options)

    def encode_url(self, url: str) -> yarl.URL:
        """The URL as the user wrote it, existing escapes included; other illegal characters and `#` are escaped."""
        return yarl.URL(quote(re.sub("%(?![0-9A-Fa-f]{2})", "%25", url), safe=_LEGAL), encoded=True)

    async def _cat_file(
        self,
        url: str,
        start: int | None = None,
        end: int | None = None,
        version: str | None = None,
        most: int | None = None,
        **options: Any,
    ) -> bytes:
        """Bytes [start, end) of a file.

        Args:
            url: of the file.
            start, end: range in bytes; None for the start and the end of the file.
            version: version that the file must have, from `_info`; None for any.
            most: largest file, in bytes, that may be sent whole in answer to a range; None for any.
            options: of the request, for aiohttp.

        Raises:
            FileNotFoundError: status 404 or 410.
            ChangedFile: the file has another version.
            NoRanges: the server ignores ranges and the file is larger than `most`.
            Refused: the answer has other bytes than the range.
        """
        if start is not None and start == end:
            return b""
        asked = {**self.kwargs, **options}
        is_range = bool(start) or end is not None
        if is_range:
            asked["headers"] = {**asked.get("headers", {}), "Range": await self._process_limits(url, start or 0, end)}
        session = await self.set_session()
        async with session.get(self.encode_url(url), **asked) as answer:
            self._raise_not_found_for_status(answer, url)
            _check_version(answer.headers, version)
            length = answer.content_length
            if answer.status == 206:
                _check_range(answer.headers, start or 0)
            elif is_range and most is not None and (length is None or max(most, end or 0) < length):
                return _part(await _at_most(answer, most), start, end)
            data: bytes = await answer.read()
        return data if answer.status == 206 else _part(data, start, end)

    async def _info(self, url: str, **options: Any) -> dict[str, Any]:
        """Size and version of a file, from a GET of its first byte: a URL signed for GET does not allow HEAD."""
        asked = {**self.kwargs, **options}
        asked["headers"] = {**asked.get("headers", {}), "Range": "bytes=0-0"}
        session = await self.set_session()
        async with session.get(self.encode_url(url), **asked) as answer:
            total = re.fullmatch(r"bytes (?:\d+-\d+|\*)/(\d+)", answer.headers.get("Content-Range", "").strip())
            if answer.status != 416 or total is None:  # an empty file has no first byte
                self._raise_not_found_for_status(answer, url)
            size = int(total[1]) if total else None
            if answer.status == 200:
                size = None if _is_encoded(answer.headers) else answer.content_length
            return {"name": url, "size": size, "type": "file", "ETag": _version(answer.headers)}

    def _raise_not_found_for_status(self, response: aiohttp.ClientResponse, url: str) -> None:
        if response.status in (404, 410):
            raise FileNotFoundError(url)
        response.raise_for_status()


def _check_version(headers: Headers, version: str | None) -> None:
    found = _version(headers)
    if version and found and version != found:
        raise ChangedFile(f"{found}, expected {version}")


def _version(headers: Headers) -> str:
    return str(headers.get("ETag") or headers.get("Last-Modified") or "")


def _is_encoded(headers: Headers) -> bool:
    return headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity")


def _check_range(headers: Headers, start: int) -> None:
    """Raise Refused for an answer with other bytes than the requested ones."""
    if _is_encoded(headers):
        raise Refused(f"found a server that sends ranges of compressed bytes ({headers['Content-Encoding']})")
    found = re.match(r"\s*bytes\s+(\d+)-", headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise Refused(
            f"found a server that answers a request for bytes from {start} with {headers.get('Content-Range')!r}"
        )


async def _at_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer of at most `most` bytes.

    Raises:
        NoRanges: the body is longer; the rest is not read.
    """
    if answer.content_length is not None and answer.content_length > most:
        raise NoRanges(f"one that sends all {answer.content_length} bytes for each range")
    pieces, size = [], 0
    async for piece in answer.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise NoRanges("one that sends all bytes for each range")
    return b"".join(pieces)


def _part(data: bytes, start: int | None, end: int | None) -> bytes:
    return data[start or 0 : end]
