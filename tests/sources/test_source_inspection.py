"""`datamerge inspect --source` and `inspect_source`: how a source would be read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import datamerge as dm
from datamerge.tools.inspection import inspect
from storage_schemas import ConfigError, SourceError
from tests.support.refusals import refused
from tests.support.small_sources import photo, put, table


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    stream = io.BytesIO()
    Image.new("L", (8, 4)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    put(folder, "cat/a.png", "cat/b.png", "dog/c.png")
    put(folder, "dog/d.jpg", data=_turned())
    put(folder, "dog/e.jpg", data=photo("JPEG")[:300])
    put(folder, "dog/f.txt", data=b"text")
    return folder


def test_facts_of_a_folder(photos: Path) -> None:
    facts = dm.inspect_source(photos)
    assert json.loads(json.dumps(facts)) == facts
    unusable = facts.pop("unusable")
    assert [entry["name"] for entry in unusable] == ["dog/e.jpg"]
    assert facts.pop("fingerprint") == dm.open_source(photos).fingerprint
    assert facts == {
        "url": str(photos),
        "kind": "image_folder",
        "split": None,
        "splits": {},
        "choose": None,
        "samples": 5,
        "unlabelled": 0,
        "no_labels_because": None,
        "classes": [{"label": 0, "name": "cat", "samples": 2}, {"label": 1, "name": "dog", "samples": 3}],
        "left_out": {".txt": 1},
        "exif": "ignore",
        "looked_at": 5,
        "sizes": {"4x4": 3, "8x4": 1},
        "modes": {"RGB": 3, "L": 1},
        "formats": {"PNG": 3, "JPEG": 1},
        "turned": 1,
    }


def test_images_that_a_merge_would_refuse_are_listed_as_unusable(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(stream, "TIFF")
    put(tmp_path, "a.png", data=photo("PNG"))
    put(tmp_path, "b.tiff", data=stream.getvalue())
    facts = dm.inspect_source(tmp_path)
    (unusable,) = facts["unusable"]
    assert unusable["name"] == "b.tiff"
    assert "SMaxSampleValue" in unusable["reason"]
    assert facts["modes"] == {"RGB": 1}


def test_the_choice_of_images_follows_the_seed(tmp_path: Path) -> None:
    for number in range(20):
        stream = io.BytesIO()
        Image.new("L", (number + 1, 1)).save(stream, "PNG")
        put(tmp_path, f"{number}.png", data=stream.getvalue())
    sizes = [dm.inspect_source(tmp_path, images=5, seed=seed)["sizes"] for seed in (0, 0, 1)]
    assert sizes[0] == sizes[1] != sizes[2]
    assert sum(sizes[0].values()) == 5
    with refused(ConfigError, "images", 0):
        dm.inspect_source(tmp_path, images=0)


def test_several_splits_are_shown_and_none_is_chosen(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        table(tmp_path / f"{split}.parquet", image=[photo()] * count, label=[0] * count)
    facts = dm.inspect_source(tmp_path)
    assert (facts["split"], facts["splits"], facts["samples"]) == (None, {"test": 1, "train": 1}, 5)
    assert "`split`" in facts["choose"]
    facts = dm.inspect_source(tmp_path, split="test")
    assert (facts["split"], facts["samples"], facts["choose"]) == ("test", 2, None)


def test_arrays_and_columns(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "a": np.zeros((3, 4, 5), np.uint8),
        "b": np.zeros((2, 4, 6), np.uint8),
        "c": np.arange(3),
    }
    np.savez(tmp_path / "x.npz", **arrays)
    facts = dm.inspect_source(tmp_path / "x.npz", image_column="a", label_column="c")
    assert (facts["sizes"], facts["formats"], len(facts["classes"])) == ({"5x4": 3}, {"pixels": 3}, 3)
    with refused(SourceError, None, tmp_path / "x.npz", "`image_column`"):
        dm.inspect_source(tmp_path / "x.npz")


def test_the_command_prints_every_fact(photos: Path, tmp_path: Path) -> None:
    """Its advice names the flag that makes the next call work."""
    thumbnails = tmp_path / "some.png"
    run = CliRunner().invoke(
        inspect, ["--source", str(photos), "--thumbnails", str(thumbnails)], catch_exceptions=False
    )
    for fact in ("image_folder", "0 cat (2), 1 dog (3)", "1 .txt", "4x4 (3), 8x4 (1)", "RGB (3), L (1)", "dog/e.jpg"):
        assert fact in run.stdout
    with Image.open(thumbnails) as image:
        assert (image.format, image.width, image.height) == ("PNG", 12, 4)
    as_json = CliRunner().invoke(inspect, ["--source", str(photos), "--json"], catch_exceptions=False)
    assert json.loads(as_json.stdout) == dm.inspect_source(photos)
    (photos / "cat").rename(photos / "train")
    (photos / "dog").rename(photos / "test")
    advised = CliRunner().invoke(inspect, ["--source", str(photos)], catch_exceptions=False)
    assert "--split" in " ".join(advised.stdout.split())
    chosen = CliRunner().invoke(inspect, ["--source", str(photos), "--split", "train"], catch_exceptions=False)
    assert chosen.exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["adv", "--source", "photos"]])
def test_either_an_artifact_or_a_source_is_required(arguments: list[str]) -> None:
    assert CliRunner().invoke(inspect, arguments).exit_code == 2


def test_options_of_sources_are_refused_for_artifacts() -> None:
    with refused(ConfigError, "split", "`split`"):
        CliRunner().invoke(inspect, ["adv", "--split", "train"], catch_exceptions=False)


def test_thumbnails_need_a_png_name_and_a_usable_image(photos: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "thumbnails", "'some.jpg'"):
        dm.inspect_source(photos, thumbnails="some.jpg")
    for path in photos.rglob("*.*"):
        path.write_bytes(b"no image")
    with refused(ConfigError, "thumbnails"):
        dm.inspect_source(photos, thumbnails=tmp_path / "x.png")
    assert len(dm.inspect_source(photos)["unusable"]) == 5
