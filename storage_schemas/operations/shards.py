"""Write an artifact derived from other artifacts, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from itertools import islice

from storage_schemas.artifact import Artifact
from storage_schemas.card.finish import finish
from storage_schemas.errors import DatamergeError
from storage_schemas.schema.manifest import HEAD, Manifest, Reject
from storage_schemas.schema.record import Record
from storage_schemas.writer import ArtifactWriter

Advance = Callable[[int], None]
"""Called with the number of groups processed since the last call."""
Made = Generator[tuple[Sequence[Record], Sequence[Reject]], None, None]
"""Records and rejects of one shard after the other."""


def write_shards(
    writer: ArtifactWriter,
    files: Mapping[str, bytes],
    make: Callable[[Sequence[int]], Made],
    advance: Advance,
) -> Manifest:
    """Commit every shard that is not committed yet, then finish the artifact with its card and pictures.

    Args:
        writer: of the new artifact; an unfinished one of the same plan is continued.
        files: contents by path of files that belong to no shard, such as the class head.
        make: takes numbers of shards and yields the records and rejects of one after the other; it may read ahead.
        advance: called after every shard.

    Raises:
        DatamergeError: the format does not allow a record.
    """
    writer.begin(files)
    committed = writer.committed()
    with closing(make([shard for shard in range(writer.layout.shards) if shard not in committed])) as made:
        for shard in range(writer.layout.shards):
            if shard not in committed:
                try:
                    writer.commit(shard, *next(made))
                except ValueError as error:  # for example a duplicate key, or a mean that is not finite
                    problem = str(error).removeprefix(f"shard {shard}: ")
                    raise DatamergeError(f"{writer.location.url}, shard {shard}: {problem}") from error
            first = shard * writer.layout.groups_per_shard
            advance(min(writer.layout.groups_per_shard, writer.layout.groups - first))
    return finish(writer)


def changed(source: Artifact, change: Callable[[Record], Record], shards: Sequence[int]) -> Made:
    """Yield shards of `source` with `change` applied to every record, and the same rejects."""
    records = source.records(index for shard in shards for index in source.indices(shard))
    for shard in shards:
        own = islice(records, len(source.indices(shard)))
        yield [change(record) for record in own], source.commit(shard).rejects


def head_file(artifact: Artifact) -> dict[str, bytes]:
    """The file of the class head, by path; empty if the artifact has none."""
    if artifact.head() is None:  # also checks its hash
        return {}
    return {HEAD: artifact.location.read(HEAD)}
