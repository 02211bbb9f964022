"""A local cache of a remote artifact's files: a folder, a byte limit, shared by all processes of a machine.

`folder` describes how copies are stored, `fetching` how they are fetched. The contents of a copy are checked like
those of any other file: a damaged or outdated copy fails its record's checksum, is dropped and fetched again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from storage_schemas.access.fetchers import fetcher_of
from storage_schemas.access.folder import Folder, folder_of
from storage_schemas.access.local_paths import absolute
from storage_schemas.access.location import Location
from storage_schemas.errors import ConfigError
from storage_schemas.schema.manifest import MANIFEST

DEFAULT_BYTES = 100 * 2**30


@dataclass(frozen=True)
class Cache:
    """A folder for copies of remote files; any number of artifacts and processes may share it.

    Attributes:
        folder: created if it is missing.
        max_bytes: byte limit of all copies in it.

    Raises:
        ConfigError: the limit is not positive, or the folder cannot be created.
    """

    folder: Path
    max_bytes: int = DEFAULT_BYTES

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"cache: expected a positive limit in bytes, found {self.max_bytes}")
        object.__setattr__(self, "folder", Path(absolute(self.folder)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cache: {self.folder}: expected a folder for copies ({error.strerror})") from None

    @property
    def copies(self) -> Folder:
        """The copies in the folder, as this process sees them."""
        return folder_of(self.folder, self.max_bytes)


class CachedLocation(Location):
    """A read-only view of a remote location through a `Cache`. A local folder is read in place.

    The manifest is always fetched, because it distinguishes old copies from new ones.
    """

    cache: Cache

    @classmethod
    def of(cls, location: Location, cache: Cache) -> CachedLocation:
        """The same location, through a cache."""
        cached = cls.__new__(cls)
        cached.__setstate__({**location.__getstate__(), "cache": cache})
        return cached

    def local_path(self, relative: str) -> str | None:
        if self.is_local or relative == MANIFEST:
            return super().local_path(relative)
        return fetcher_of(self).whole_path(relative)

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        if self.is_local or relative == MANIFEST:
            return super().read(relative, start, end)
        return fetcher_of(self).read_file(relative, start, end)

    def forget(self, relatives: Iterable[str]) -> bool:
        if self.is_local:
            return False
        return max([fetcher_of(self).forget(relative) for relative in relatives], default=False)
