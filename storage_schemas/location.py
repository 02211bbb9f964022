"""A folder anywhere fsspec reaches, with whole-file atomic writes."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, cast

import fsspec

from storage_schemas.errors import UserError

WRITE_ATTEMPTS = 5


class Location:
    """A root folder: a local path or any fsspec URL (``s3://``, ``gs://``, ``https://``, ``memory://``).

    Paths given to the methods are relative to the root and use ``/``.
    """

    def __init__(self, url: str | os.PathLike[str], **storage_options: Any) -> None:
        self.url = os.fspath(url).rstrip("/") or "/"
        self._options = storage_options
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.url, **storage_options)
        except ImportError as error:
            raise UserError(f"{self.url}: the driver for this URL is not installed ({error})") from None
        except ValueError as error:
            raise UserError(f"{self.url}: not a path or URL that fsspec knows ({error})") from None

    @property
    def is_local(self) -> bool:
        return "file" in self.fs.protocol or "local" in self.fs.protocol

    def path(self, relative: str) -> str:
        """The full path of a file in this folder, as its file system spells it."""
        return f"{self.root}/{relative}" if relative else self.root

    def exists(self, relative: str = "") -> bool:
        return bool(self.fs.exists(self.path(relative)))

    def size(self, relative: str) -> int:
        """Bytes of one file; raises FileNotFoundError."""
        return int(self.fs.size(self.path(relative)))

    def names(self, relative: str = "") -> list[str]:
        """Sorted names of the entries of a folder, empty when there is no such folder."""
        self.fs.invalidate_cache()
        try:
            entries = self.fs.ls(self.path(relative), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        """All bytes of a file, or the range [start, end); raises FileNotFoundError."""
        return cast(bytes, self.fs.cat_file(self.path(relative), start=start, end=end))

    def write(self, relative: str, data: bytes) -> None:
        """Write a file so that a reader sees all of it or none, whatever kills this process."""
        if self.is_local:
            for attempt in range(WRITE_ATTEMPTS):
                try:
                    return _write_local(Path(self.path(relative)), data)
                except FileNotFoundError:
                    # Another writer that has finished took our temporary file for a leftover.
                    if attempt == WRITE_ATTEMPTS - 1:
                        raise
        else:
            # Object stores publish a PUT only when it is complete.
            self.fs.pipe_file(self.path(relative), data)

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed; only local folders have them."""
        if self.is_local:
            for path in Path(self.root).rglob(".*.tmp"):
                path.unlink(missing_ok=True)

    def remove(self, relative: str) -> None:
        self.fs.rm_file(self.path(relative))

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_options": self._options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"], **state["_options"])  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"Location({self.url!r})"


def _write_local(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The rename itself must survive a power cut, or a sidecar could outlive its shard.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
