"""Number of reads that finishing an artifact takes: on an object store each read of a sidecar is a round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from storage_schemas import ArtifactWriter, Layout, Location, Record
from storage_schemas.card.contact_sheet import ROWS
from storage_schemas.operations.shards import write_shards
from storage_schemas.sidecars import CACHED_COMMITS

SHARDS = CACHED_COMMITS + 6  # fewer would be read from memory


class Counted(Location):
    """Counts the calls of `read` and `size` for each file."""

    def __init__(self, url: Path) -> None:
        super().__init__(url)
        self.calls: Counter[str] = Counter()

    def read(self, relative: str, start: int | None = None, end: int | None = None) -> bytes:
        self.calls[relative] += 1
        return super().read(relative, start, end)

    def size(self, relative: str) -> int:
        self.calls[relative] += 1
        return super().size(relative)


def test_every_sidecar_is_read_once_to_finish(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    make_record: Callable[[int, Layout], Record],
    provenance: dict[str, Any],
    format_name: str,
) -> None:
    """Each once, and once more for every group on the contact sheet."""
    layout = make_layout(format_name, groups=SHARDS).model_copy(update={"groups_per_shard": 1})
    location = Counted(tmp_path / "a")
    write_shards(
        ArtifactWriter(location, layout, provenance),
        {},
        lambda shards: (([make_record(shard, layout)], []) for shard in shards),
        lambda _: None,
    )
    location.calls.clear()
    writer = ArtifactWriter(location, layout, provenance)
    manifest = write_shards(writer, {}, lambda shards: (([], []) for _ in shards), lambda _: None)
    assert manifest.complete
    sidecars = {path: times for path, times in location.calls.items() if path.startswith("commits/")}
    assert len(sidecars) == SHARDS
    assert sum(sidecars.values()) == SHARDS + ROWS, sidecars
