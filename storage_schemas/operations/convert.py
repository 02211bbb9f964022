"""Convert an artifact to another format or encoding.

The result equals, byte for byte, what the merge would have written with that format and encoding: provenance, order,
shards and rejects are unchanged. One shard is in memory at a time.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from storage_schemas.access.location import Location
from storage_schemas.artifact import Artifact
from storage_schemas.operations.shards import Advance, changed, head_file, write_shards
from storage_schemas.schema.arguments import check_choice
from storage_schemas.schema.exact import exact_moments, pixel_spread
from storage_schemas.schema.manifest import MOMENTS, EncodingName, Format, Layout, Manifest
from storage_schemas.schema.moments import LEVELS
from storage_schemas.schema.record import Record, encode_exact, moment_specs
from storage_schemas.writer import ArtifactWriter


def convert(
    source: Artifact, target: Location, format: Format, encoding: EncodingName, advance: Advance = lambda _: None
) -> Manifest:
    """Write `source` to `target` in another format or encoding; an unfinished conversion is continued.

    `uint8_moments` to `float32` rounds once, to float32. `float32` to `uint8_moments` is exact, or refused before
    anything is written.

    Args:
        source: the artifact to convert.
        target: where to write the new one.
        format: `zarr` or `webdataset`.
        encoding: `float32` or `uint8_moments`.
        advance: called with the number of groups written since the last call.

    Raises:
        ConfigError: an unknown format or encoding.
        UserError: a float32 artifact has values that are not moments of 8-bit pixels (see `exact_moments`), or the
            target holds something else.
    """
    check_choice("format", format, Format)
    check_choice("encoding", encoding, EncodingName)
    layout = _layout(source, format, encoding)
    where = source.location.url

    def change(record: Record) -> Record:
        return _converted(record, layout, where)

    writer = ArtifactWriter(target, layout, source.manifest.provenance)
    return write_shards(writer, head_file(source), partial(changed, source, change), advance)


def _layout(source: Artifact, format: Format, encoding: EncodingName) -> Layout:
    old = source.manifest.layout
    if encoding == old.encoding:
        return old.model_copy(update={"format": format})
    others = [spec for spec in old.arrays if spec.name not in MOMENTS]
    count, spread = 1, LEVELS
    if encoding == "uint8_moments":
        count, spread = _exact_extent(source)
    arrays = (*moment_specs(encoding, old.pixels, count, spread), *others)
    return old.model_copy(update={"format": format, "encoding": encoding, "arrays": arrays})


def _exact_extent(source: Artifact) -> tuple[int, int]:
    """Largest group, and largest spread in grey levels; reads every record, so that none is refused later."""
    provenance = source.manifest.provenance
    grouping = provenance.get("grouping")
    planned = grouping.get("members") if isinstance(grouping, dict) and "attack" in provenance else None
    count = planned if isinstance(planned, int) else 1
    spread = pixel_spread(provenance)
    for record in source:
        scatter = int(exact_moments(record, source.location.url).scatter.max())
        count = max(count, record.count)
        if scatter > record.count**2 * spread**2 // 4:
            spread = LEVELS
    return count, spread


def _converted(record: Record, layout: Layout, where: str) -> Record:
    if record.encoding == layout.encoding:
        return record
    arrays = {**record.arrays, **encode_exact(exact_moments(record, where), layout)}
    names = [spec.name for spec in layout.arrays]
    return dataclasses.replace(record, encoding=layout.encoding, arrays={name: arrays[name] for name in names})
