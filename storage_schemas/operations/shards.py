"""Writing an artifact made from artifacts, shard by shard."""

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
"""Called with the number of groups that have been dealt with since the last call."""
Made = Generator[tuple[Sequence[Record], Sequence[Reject]], None, None]
"""What shards hold, one after the other."""


def write_shards(
    writer: ArtifactWriter,
    files: Mapping[str, bytes],
    make: Callable[[Sequence[int]], Made],
    advance: Advance,
) -> Manifest:
    """Commit every shard that is not committed yet, then finish the artifact with its card and pictures.

    Args:
        writer: of the new artifact; an unfinished one of the same plan is continued.
        files: what belongs to no shard, such as the class head.
        make: gives what the shards of these numbers hold, one after the other; it may read ahead.
        advance: called after every shard.

    Raises:
        DatamergeError: a record that the format does not allow.
    """
    writer.begin(files)
    committed = writer.committed()
    with closing(make([shard for shard in range(writer.layout.shards) if shard not in committed])) as made:
        for shard in range(writer.layout.shards):
            if shard not in committed:
                try:
                    writer.commit(shard, *next(made))
                except ValueError as error:  # a key that is there twice, a mean that is no number
                    problem = str(error).removeprefix(f"shard {shard}: ")
                    raise DatamergeError(f"{writer.location.url}, shard {shard}: {problem}") from error
            first = shard * writer.layout.groups_per_shard
            advance(min(writer.layout.groups_per_shard, writer.layout.groups - first))
    return finish(writer)


def changed(source: Artifact, change: Callable[[Record], Record], shards: Sequence[int]) -> Made:
    """Shards of an artifact with every record changed, and the same rejects."""
    records = source.records(index for shard in shards for index in source.indices(shard))
    for shard in shards:
        own = islice(records, len(source.indices(shard)))
        yield [change(record) for record in own], source.commit(shard).rejects


def head_file(artifact: Artifact) -> dict[str, bytes]:
    """The class head as a file that belongs to no shard, if the artifact has one."""
    if artifact.head() is None:  # reads it, and checks its hash
        return {}
    return {HEAD: artifact.location.read(HEAD)}
