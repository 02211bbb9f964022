"""Writing an artifact made from artifacts, shard by shard."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from storage_schemas.artifact import Artifact
from storage_schemas.card.finish import finish
from storage_schemas.errors import DatamergeError
from storage_schemas.schema.manifest import HEAD, Manifest, Reject
from storage_schemas.schema.record import Record
from storage_schemas.writer import ArtifactWriter

Advance = Callable[[int], None]
"""Called with the number of groups that have been dealt with since the last call."""


def write_shards(
    writer: ArtifactWriter,
    files: Mapping[str, bytes],
    make: Callable[[int], tuple[Sequence[Record], Sequence[Reject]]],
    advance: Advance,
) -> Manifest:
    """Commit every shard that is not committed yet, then finish the artifact with its card and pictures.

    Args:
        writer: of the new artifact; an unfinished one of the same plan is continued.
        files: what belongs to no shard, such as the class head.
        make: gives the records and rejects of a shard, by its number.
        advance: called after every shard.

    Raises:
        DatamergeError: a record that the format does not allow.
    """
    writer.begin(files)
    committed = writer.committed()
    for shard in range(writer.layout.shards):
        if shard not in committed:
            try:
                writer.commit(shard, *make(shard))
            except ValueError as error:  # a key that is there twice, a mean that is no number
                problem = str(error).removeprefix(f"shard {shard}: ")
                raise DatamergeError(f"{writer.location.url}, shard {shard}: {problem}") from error
        first = shard * writer.layout.groups_per_shard
        advance(min(writer.layout.groups_per_shard, writer.layout.groups - first))
    return finish(writer)


def head_file(artifact: Artifact) -> dict[str, bytes]:
    """The class head as a file that belongs to no shard, if the artifact has one."""
    if artifact.head() is None:  # reads it, and checks its hash
        return {}
    return {HEAD: artifact.location.read(HEAD)}
