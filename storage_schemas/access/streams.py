"""Remote files read in several requests, all of which must see the same version of the file."""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, cast

import fsspec.asyn

if TYPE_CHECKING:
    from storage_schemas.access.location import Location

BLOCK = 5 * 2**20  # smallest request of a remote stream, in bytes


class RemoteStream(io.RawIOBase):
    """A remote file as a seekable stream; every read is one HTTP range request."""

    def __init__(self, location: Location, relative: str) -> None:
        self._location, self._relative = location, relative
        self._size, self._position = location.pin(relative), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        start, end = self._position, min(self._position + len(buffer), self._size)
        if start >= end:
            return 0
        data = self._location.sent(self._relative, start, end, BLOCK)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def read_version(fs: Any, path: str, start: int | None, end: int | None, version: str) -> bytes:
    """Bytes [start, end) of an S3 object with this ETag; raises the driver's error for status 412 if it changed."""
    return cast(bytes, fsspec.asyn.sync(fs.loop, _read_version, fs, path, start, end, version))


async def _read_version(fs: Any, path: str, start: int | None, end: int | None, version: str) -> bytes:
    bucket, key, version_id = fs.split_path(path)
    more = {"VersionId": version_id} if version_id else {}
    if start is not None or end is not None:
        if start == end:
            return b""
        more["Range"] = await fs._process_limits(path, start, end)
    answer = await fs._call_s3("get_object", Bucket=bucket, Key=key, IfMatch=version, **more)
    try:
        return cast(bytes, await answer["Body"].read())
    finally:
        answer["Body"].close()
