"""What the commands do with artifacts, as functions: places as text, paths, `Location`s or open artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import datamerge as dm
from tests.support.combining import ROUND, attacked, make
from tests.support.paths import GOLDEN

FULL = GOLDEN / "v1" / "zarr-uint8_moments-full"


@pytest.mark.parametrize("given", [str(FULL), FULL, dm.Location(FULL), dm.open_artifact(FULL)], ids=type)
def test_an_artifact_is_given_in_any_way(given: str | Path | dm.Location | dm.Artifact, tmp_path: Path) -> None:
    assert dm.inspect(given)["groups"] == len(dm.open_artifact(FULL))
    assert dm.verify(given).problems == []
    assert dm.diff(given, FULL).equal
    converted = dm.convert(given, tmp_path / "tar", format="webdataset")
    assert converted.manifest.layout.format == "webdataset"
    assert converted.manifest.layout.encoding == "uint8_moments"


def test_converting_keeps_what_is_not_asked_for_and_continues(tmp_path: Path) -> None:
    target = dm.Location(tmp_path / "float32")
    converted = dm.convert(FULL, target, encoding="float32")
    assert (converted.manifest.layout.format, converted.manifest.layout.encoding) == ("zarr", "float32")
    np.testing.assert_allclose(converted[0].mean, dm.open_artifact(FULL)[0].mean, rtol=1e-6)
    assert dm.convert(FULL, target, encoding="float32").manifest == converted.manifest
    difference = dm.diff(FULL, converted)
    assert not difference.equal
    assert dm.diff(FULL, converted, tolerance=1e-6).equal


def test_verify_takes_damaged_shards_back_if_asked_to(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "a")
    shard = dm.open_artifact(tmp_path / "a").commit(0).files[0].path
    (tmp_path / "a" / shard).write_bytes(b"damage")
    assert dm.verify(tmp_path / "a").problems
    assert dm.verify(tmp_path / "a", fix=True).removed
    with pytest.raises(dm.NotAnArtifact):
        dm.open_artifact(tmp_path / "a")
    assert len(dm.open_artifact(tmp_path / "a", partial=True)) < len(dm.open_artifact(FULL))


def test_preview_is_a_picture() -> None:
    key = dm.open_artifact(FULL)[0].key
    one, more = dm.preview(FULL, keys=[key]), dm.preview(FULL, groups=3)
    assert (one.format, one.width) == ("PNG", more.width)
    assert one.height < more.height


def test_remerge_merges_fewer_members(tmp_path: Path) -> None:
    pairs = dm.remerge(FULL, tmp_path / "pairs", dm.Remerge(members=2, keep_members=False))
    assert max(record.count for record in pairs) == 2
    assert pairs[0].members is None
    with pytest.raises(dm.ConfigError):
        dm.remerge(pairs, tmp_path / "again", dm.Remerge(members=1))


def test_combine_refuses_the_same_samples_twice_and_unites_others(tmp_path: Path) -> None:
    with pytest.raises(dm.UserError):
        dm.combine([FULL, FULL], tmp_path / "twice")
    with pytest.raises(dm.ConfigError):
        dm.combine([FULL], tmp_path / "one")
    assert not list(tmp_path.iterdir())
    rounds = [make(tmp_path / str(seed), attacked(["g1"], seed), {**ROUND, "seed": seed}) for seed in (1, 2)]
    union = dm.combine(rounds, tmp_path / "union")
    assert union["g1"].count == rounds[0]["g1"].count + rounds[1]["g1"].count


def test_export_writes_files_and_names_them(tmp_path: Path) -> None:
    record = dm.open_artifact(FULL)[0]
    (name,) = dm.export(FULL, [record.key], tmp_path)
    with np.load(tmp_path / name) as arrays:
        np.testing.assert_array_equal(arrays["mean"], record.mean)
    pictures = dm.export(FULL, [record.key], tmp_path, kind="png")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, *pictures])
    with pytest.raises(dm.ConfigError):
        dm.export(FULL, ["nobody"], tmp_path)
