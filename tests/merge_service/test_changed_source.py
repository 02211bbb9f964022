"""A merge that resumes on a changed source: an error, or a warning if the changed file had not been hashed."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamerge.sources import sample
from merge_service import MergeConfig
from merge_service.merge import prepare
from storage_schemas import ArtifactWriter, Location, SourceError
from tests.support.refusals import refused

PHOTOS = 200


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Bitmaps of one size, more of them than are hashed in a large source."""
    folder = tmp_path / "photos"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(PHOTOS):
        path = folder / f"{index:03d}.bmp"
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
        _date(path, -60)
    return folder


def _date(path: Path, seconds: float) -> None:
    """Set the time of the file's last change to `seconds` from now."""
    os.utime(path, (time.time() + seconds,) * 2)


def _begin(photos: Path) -> None:
    config = MergeConfig(source=str(photos), artifact=str(photos.parent / "a"), encoder="mlp:3x4x4-3")
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)


def _change(photos: Path) -> str:
    """Replace a file that is not hashed in a large source by another image of the same size; return its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "WHOLE_BYTES", 0)
        files = [(path.name, path.stat().st_size) for path in photos.iterdir()]
        listing = sample.make_listing(Location(photos), files)
    name = next(name for name in sorted(listing)[PHOTOS // 2 :] if listing[name][1] is None)
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(photos / name)
    _date(photos / name, 60)
    return name


def test_changed_pixels_of_one_file_are_refused(photos: Path) -> None:
    _begin(photos)
    _begin(photos)  # unchanged
    name = _change(photos)
    with refused(SourceError, None, photos, photos.parent / "a", name):
        _begin(photos)


def test_a_changed_file_that_was_not_hashed_gives_a_warning(
    photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sample, "WHOLE_BYTES", 0)
    _begin(photos)
    _begin(photos)
    assert ".bmp" not in capsys.readouterr().err
    name = _change(photos)
    _begin(photos)
    assert {"1", name} <= set(re.findall(r"[\w.]+", capsys.readouterr().err))
    size = (photos / "000.bmp").stat().st_size
    (photos / "000.bmp").write_bytes(b"short")
    with refused(SourceError, None, photos, "000.bmp", f" {size} ", " 5"):
        _begin(photos)
