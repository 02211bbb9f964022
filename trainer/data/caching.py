"""The local cache of remote artifacts: on unless it is refused, limited, and said in a line."""

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
SHARE = 0.8  # of what a disk has for the cache, where nobody has set a limit


def opened(url: str, cache: str | None, cache_bytes: int | None) -> Artifact:
    """Open an artifact, through a cache if it is remote.

    Args:
        url: folder or URL.
        cache: folder for copies; "none" for no cache, None for a folder of the user's cache directory.
        cache_bytes: what it may hold; None for `LIMIT`, or less on a smaller disk.

    Raises:
        ConfigError: the folder that was asked for cannot be made.
        NotAnArtifact: there is none at the URL.
    """
    location = Location(url)
    if location.is_local:
        return open_artifact(location)
    kept = _cache(cache, cache_bytes)
    if kept is None:
        say(f"cache: none; {location.url} is streamed, with {NEAR_BYTES // 2**20} MB of records ahead in memory")
    else:
        said = f"cache: what is read of {location.url} is kept in {kept.folder}, up to {_size(kept.max_bytes)}"
        say(f'{said}; `cache="{NONE}"` keeps nothing')
    return open_artifact(location, cache=kept)


def check_room(groups: Blend) -> None:
    """Warn if the cache cannot hold all that is read of remote artifacts."""
    room = groups.cache_bytes
    needed = groups.bytes_read if room else 0
    if 0 < room < needed:
        urls = ", ".join(artifact.location.url for artifact in groups.artifacts if not artifact.location.is_local)
        warn(
            f"cache_bytes: the cache may hold {_size(room)}, what is read of {urls} takes "
            f"{_size(needed)}: the rest is fetched again every epoch, record by record, which is slower; set "
            f"`cache_bytes={-(-needed // 10**9)}GB`, which holds all, or a smaller `shuffle_window`, or "
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
    except ConfigError as error:  # nobody asked for this folder
        warn(f"{printable(str(error))}; nothing is kept")
        return None


def _default_limit(folder: Path) -> int:
    """`LIMIT`, or a share of what is free for the cache and what it has taken already."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        taken = sum(512 * file.stat().st_blocks for file in folder.iterdir() if file.is_file())
    except OSError:  # no folder yet, or one that is being worked in
        taken = 0
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        return LIMIT
    return max(1, min(LIMIT, int(SHARE * (free + taken))))


def _size(count: int) -> str:
    return f"{count / 10**9:.3g} GB" if count >= 10**9 else f"{count / 10**6:.3g} MB"
