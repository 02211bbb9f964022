"""The local cache of remote artifacts: on by default, limited in size, and announced in a message."""

from __future__ import annotations

import shutil
from pathlib import Path

from datamerge.runtime.messages import say, warn
from datamerge.runtime.user_cache import user_cache
from storage_schemas import Artifact, Cache, ConfigError, Location, open_artifact, printable
from storage_schemas.access.local_paths import user_path
from trainer.data.ahead import NEAR_BYTES
from trainer.data.blend import Blend

NONE = "none"
LIMIT = 100 * 10**9
SHARE = 0.8  # largest default share of the disk space that is free or already taken by the cache


def opened(url: str, cache: str | None, cache_bytes: int | None) -> Artifact:
    """Open an artifact, through a cache if it is remote.

    Args:
        url: folder or URL of the artifact.
        cache: folder of the cache; "none" for no cache, None for a folder in the user's cache directory.
        cache_bytes: capacity of the cache; None for `LIMIT`, or less on a small disk.

    Raises:
        ConfigError: the folder `cache` cannot be created.
        NotAnArtifact: there is no artifact at the URL.
    """
    location = Location(url)
    if location.is_local:
        return open_artifact(location)
    kept = _cache(cache, cache_bytes)
    if kept is None:
        say(f"cache: none; {location.url} is streamed, with {NEAR_BYTES // 2**20} MB of records ahead in memory")
    else:
        message = f"cache: {kept.folder} keeps what is read of {location.url}, up to {_size(kept.max_bytes)}"
        say(f'{message}; `cache="{NONE}"` keeps nothing')
    return open_artifact(location, cache=kept)


def check_room(groups: Blend) -> None:
    """Warn if the cache is too small for what the run reads of remote artifacts."""
    room = groups.cache_bytes
    needed = groups.bytes_read if room else 0
    if 0 < room < needed:
        urls = ", ".join(artifact.location.url for artifact in groups.artifacts if not artifact.location.is_local)
        warn(
            f"cache_bytes: expected room for the {_size(needed)} that are read of {urls}, found {_size(room)}; the "
            "rest is fetched again every epoch, record by record, which is slower; set "
            f"`cache_bytes={-(-needed // 10**9)}GB`, a smaller `shuffle_window`, or "
            f'`cache="{NONE}"`'
        )


def _cache(folder: str | None, limit: int | None) -> Cache | None:
    if folder == NONE:
        return None
    if folder is not None:
        path = user_path(folder)
        return Cache(path, limit or _default_limit(path))
    own = user_cache("artifacts")
    if own is None:
        return None
    try:
        return Cache(own, limit or _default_limit(own))
    except ConfigError as error:  # only a warning, since the user did not ask for this folder
        warn(f"{printable(str(error))}; nothing is kept")
        return None


def _default_limit(folder: Path) -> int:
    """`LIMIT`, but at most `SHARE` of the disk space that is free or already taken by the cache."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        taken = sum(512 * file.stat().st_blocks for file in folder.iterdir() if file.is_file())
    except OSError:  # the folder does not exist yet, or another process is changing it
        taken = 0
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return LIMIT
    return max(1, min(LIMIT, int(SHARE * (free + taken))))


def _size(count: int) -> str:
    return f"{count / 10**9:.3g} GB" if count >= 10**9 else f"{count / 10**6:.3g} MB"
