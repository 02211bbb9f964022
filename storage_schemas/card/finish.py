"""What is made of all sidecars: dataset card, Croissant metadata, contact sheet, and the index of keys."""

from __future__ import annotations

from collections.abc import Callable

from storage_schemas.artifact import Artifact, open_artifact
from storage_schemas.card.contact_sheet import contact_sheet
from storage_schemas.card.croissant import LISTED_FILES, croissant
from storage_schemas.card.dataset_card import dataset_card
from storage_schemas.card.summary import Tally
from storage_schemas.key_index import KeyIndex
from storage_schemas.schema.manifest import CARD, CROISSANT, PREVIEW, Commit, FileEntry, Manifest
from storage_schemas.writer import ArtifactWriter


class Presentation:
    """`README.md`, `croissant.json`, `preview.png` unless the artifact is empty, `keys.bin` where keys are scattered.

    They are made from its content alone.
    """

    def __init__(self) -> None:
        self._tally, self._keys = Tally(), KeyIndex()
        self._listed: list[FileEntry] = []

    def add(self, sidecar: FileEntry, commit: Commit) -> None:
        """Take in the next shard, in the order of the manifest."""
        self._tally.add(commit)
        self._keys.add(commit)
        if len(self._listed) <= LISTED_FILES:  # one more says that there are too many
            self._listed += [sidecar, *commit.files]

    def files(self, artifact: Artifact) -> dict[str, bytes]:
        """Their names and contents, once all shards are taken in; reads the groups that the contact sheet shows."""
        facts = self._tally.facts(artifact.manifest, artifact.location.url)
        files = {CARD: dataset_card(facts).encode(), CROISSANT: croissant(facts, self._listed)}
        files |= self._keys.files(artifact.manifest)
        if len(artifact):
            files[PREVIEW] = contact_sheet(artifact)
        return files


def finish(writer: ArtifactWriter, check: Callable[[Manifest], None] = lambda _: None) -> Manifest:
    """Finish an artifact whose shards are all committed, with the files that are made of all of them.

    Every sidecar is read once, and those of the groups on the contact sheet once more.

    Args:
        check: told the manifest before any of these files is made.
    """
    presentation = Presentation()
    manifest = writer.finish(on_sidecar=presentation.add)
    check(manifest)
    return writer.add_files(manifest, presentation.files(open_artifact(writer.location)))
