"""The merge command on a real local Ray: same bytes however the work was cut, interrupted or retried."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from merge_service import MergeConfig, merge
from storage_schemas import DatamergeError, open_artifact

# Ray's own start-up leaves file handles and sockets to the collector.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for index in range(7):
        Image.fromarray(generator.integers(0, 256, (12, 10, 3), np.uint8)).save(folder / f"{index}.png")
    (folder / "broken.jpg").write_text("not an image")
    return folder


def _config(photos: Path, artifact: Path, workers: int) -> MergeConfig:
    return MergeConfig(
        source=str(photos),
        artifact=str(artifact),
        encoder="mlp:3x8x8-16-4",
        members=3,
        steps=2,
        groups_per_shard=3,
        max_workers=workers,
        keep_members=True,
        keep_clean=True,
    )


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_workers_and_interruptions_do_not_change_a_byte(photos: Path, tmp_path: Path) -> None:
    first = merge(_config(photos, tmp_path / "one", 1))
    merge(_config(photos, tmp_path / "two", 2))
    assert first.manifest.groups == 7
    assert [reject.sample for reject in first.rejects] == ["broken.jpg"]
    golden = _tree(tmp_path / "one")
    assert _tree(tmp_path / "two") == golden
    # As after a kill: one shard written and not committed, another half written.
    (tmp_path / "two" / "commits" / "00001.json").unlink()
    (tmp_path / "two" / "groups.zarr" / "sum" / "c" / "1" / "0" / "0" / ".0.killed.tmp").write_bytes(b"half")
    assert merge(_config(photos, tmp_path / "two", 2)).merged_shards == 1
    assert _tree(tmp_path / "two") == golden
    for record in open_artifact(tmp_path / "two"):
        assert record.members is not None
        assert record.clean is not None
        assert np.abs(record.members.astype(int) - record.clean.astype(int)).max() <= 2
        np.testing.assert_allclose(record.mean, record.members.mean(axis=0) / 255, atol=1e-7)
        np.testing.assert_allclose(record.variance, (record.members / 255).var(axis=0), atol=1e-9)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("text")
    with pytest.raises(DatamergeError, match="at least one usable group"):
        merge(_config(tmp_path / "in", tmp_path / "out", 1))
