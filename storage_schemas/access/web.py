"""Files of web servers, in the spellings of HTTP that are met: no ranges, no HEAD, redirects, gzip, changed files.

A server may answer a range with the whole file, and say so by 200 in place of 206; a body may be compressed, and its
length is then that of other bytes; and a file may be another one by the next request. Every answer is looked at.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import aiohttp
import yarl
from fsspec.implementations.http import HTTPFileSystem

from storage_schemas.access.explaining import ChangedFile, NoRanges, Refused

Headers = Any  # a mapping of aiohttp's, whose keys have no case
# Of a connection, and of every piece of an answer; an answer as a whole may take as long as it has bytes.
CONNECT_SECONDS, PIECE_SECONDS = 15, 30
# All that may stand in a URL; a percent sign too where it escapes something.
_LEGAL = "%/:=&?~+!$,;'@()*[]-._"


class WebFileSystem(HTTPFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """fsspec's file system of http(s), with answers that are checked."""

    def __init__(self, client_kwargs: dict[str, Any] | None = None, **options: Any) -> None:
        own = dict(client_kwargs or {})
        # Compressed bytes have other ranges, and another length.
        own["headers"] = {"Accept-Encoding": "identity", **dict(own.get("headers") or {})}
        own.setdefault(
            "timeout", aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=PIECE_SECONDS)
        )
        # A redirect may be signed as it is spelt.
        own.setdefault("requote_redirect_url", False)
        super().__init__(client_kwargs=own, **options)

    def encode_url(self, url: str) -> yarl.URL:
        """The address as the user spelt it, its escapes with it; what has no place in one is escaped, `#` as well."""
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
            version: that the file must have, as `_info` gave it; None for any.
            most: bytes of a file that may be sent whole where a range is asked for; None for any.

        Raises:
            ChangedFile, NoRanges: see there.
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
        """Size and version of a file, from an answer with one byte of it: signatures for GET are none for HEAD."""
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
    """Raise for an answer with other bytes than those asked for."""
    if _is_encoded(headers):
        raise Refused(f"found a server that sends ranges of compressed bytes ({headers['Content-Encoding']})")
    found = re.match(r"\s*bytes\s+(\d+)-", headers.get("Content-Range", ""))
    if found is None or int(found[1]) != start:
        raise Refused(
            f"found a server that answers a request for bytes from {start} with {headers.get('Content-Range')!r}"
        )


async def _at_most(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer that may be too long.

    Raises:
        NoRanges: it is; its rest is not waited for.
    """
    if answer.content_length is not None and answer.content_length > most:
        raise NoRanges(f"one that sends all {answer.content_length} bytes each time")
    pieces, size = [], 0
    async for piece in answer.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > most:
            raise NoRanges("one that sends all bytes each time")
    return b"".join(pieces)


def _part(data: bytes, start: int | None, end: int | None) -> bytes:
    return data[start or 0 : end]
