"""The commands on artifacts as functions, which accept a string, a path, a `Location` or an open artifact."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import datamerge as dm
from tests.support.combining import ROUND, attacked, make
from tests.support.paths import GOLDEN
from tests.support.refusals import refused

FULL = GOLDEN / "v1" / "zarr-uint8_moments-full"
KEY = "cat-0"


@pytest.mark.parametrize("given", [str(FULL), FULL, dm.Location(FULL), dm.open_artifact(FULL)], ids=type)
def test_an_artifact_is_accepted_in_every_form(given: str | Path | dm.Location | dm.Artifact, tmp_path: Path) -> None:
    assert dm.inspect(given)["groups"] == len(dm.open_artifact(FULL))
    assert dm.verify(given).problems == []
    assert dm.diff(given, FULL).equal
    converted = dm.convert(given, tmp_path / "tar", format="webdataset")
    assert converted.manifest.layout.format == "webdataset"
    assert converted.manifest.layout.encoding == "uint8_moments"


def test_converting_keeps_the_format_unless_given_and_can_be_repeated(tmp_path: Path) -> None:
    target = dm.Location(tmp_path / "float32")
    converted = dm.convert(FULL, target, encoding="float32")
    assert (converted.manifest.layout.format, converted.manifest.layout.encoding) == ("zarr", "float32")
    np.testing.assert_allclose(converted[0].mean, dm.open_artifact(FULL)[0].mean, rtol=1e-6)
    assert dm.convert(FULL, target, encoding="float32").manifest == converted.manifest
    difference = dm.diff(FULL, converted)
    assert not difference.equal
    assert dm.diff(FULL, converted, tolerance=1e-6).equal


def test_verify_with_fix_removes_damaged_shards(tmp_path: Path) -> None:
    shutil.copytree(FULL, tmp_path / "a")
    shard = dm.open_artifact(tmp_path / "a").commit(0).files[0].path
    (tmp_path / "a" / shard).write_bytes(b"damage")
    assert dm.verify(tmp_path / "a").problems
    assert dm.verify(tmp_path / "a", fix=True).removed
    with refused(dm.NotAnArtifact, None, tmp_path / "a", "1 of 2"):
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
    with refused(dm.ConfigError, None, tmp_path / "pairs", "`keep_members=True`"):
        dm.remerge(pairs, tmp_path / "again", dm.Remerge(members=1))


def test_combine_refuses_the_same_samples_twice_and_unites_others(tmp_path: Path) -> None:
    with refused(dm.UserError, None, KEY, f"{KEY}/0.png", FULL):
        dm.combine([FULL, FULL], tmp_path / "twice")
    with refused(dm.ConfigError, "artifacts", 1):
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
    with refused(dm.ConfigError, None, FULL, "'nobody'"):
        dm.export(FULL, ["nobody"], tmp_path)


@pytest.mark.parametrize(
    ("call", "field", "facts"),
    [
        (lambda out: dm.remerge(FULL, out, dm.Remerge(factor_kind="foo")), "factor_kind", ["principal", "'foo'"]),  # type: ignore[arg-type]
        (lambda out: dm.remerge(FULL, out, dm.Remerge(members=0)), "members", [" 1,", " 0"]),
        (lambda out: dm.remerge(FULL, out, dm.Remerge(factors=0)), "factors", [" 1,", " 0"]),
        (lambda out: dm.remerge(FULL, out, dm.Remerge(members=np.int64(2))), "members", [" 1,", "np.int64(2)"]),  # type: ignore[arg-type]
        (lambda out: dm.remerge(FULL, out, dm.Remerge(keep_members="no")), "keep_members", ["True", "False", "'no'"]),  # type: ignore[arg-type]
        (lambda out: dm.remerge(FULL, out, dm.Remerge(members=True)), "members", [" 1,", " True"]),
        (lambda out: dm.convert(FULL, out, format="tar"), "format", ["zarr", "webdataset", "'tar'"]),  # type: ignore[arg-type]
        (lambda out: dm.convert(FULL, out, format=""), "format", ["zarr", "webdataset", "''"]),  # type: ignore[arg-type]
        (lambda out: dm.convert(FULL, out, encoding="x"), "encoding", ["float32", "uint8_moments", "'x'"]),  # type: ignore[arg-type]
        (lambda out: dm.export(FULL, [KEY], out, kind="jpg"), "kind", ["npz", "png", "'jpg'"]),  # type: ignore[arg-type]
        (lambda out: dm.export(FULL, KEY, out), "keys", [" list", f"'{KEY}'"]),
        (lambda out: dm.diff(FULL, FULL, tolerance=-1), "tolerance", [" 0,", "-1"]),
        (lambda out: dm.diff(FULL, FULL, tolerance=float("nan")), "tolerance", [" 0,", "nan"]),
        (lambda out: dm.preview(FULL, groups=0), "groups", [" 1,", " 0"]),
        (lambda out: dm.preview(FULL, keys=KEY), "keys", [" list", f"'{KEY}'"]),
        (lambda out: dm.combine("adv", out), "artifacts", [" list", "'adv'"]),
        (lambda out: dm.combine(dm.open_artifact(FULL), out), "artifacts", [" list", "<Artifact"]),  # type: ignore[arg-type]
        (lambda out: dm.combine([FULL, FULL], out, allow_different="seed"), "allow_different", [" list", "'seed'"]),
        (lambda out: dm.open_source(FULL, limit=-1), "limit", [" 1,", "-1"]),
        (lambda out: dm.open_artifact(FULL, verify="all"), "verify", ["off", "record", "shard", "'all'"]),  # type: ignore[arg-type]
    ],
)
def test_wrong_choices_are_refused_before_anything_is_written(
    call: Callable[[Path], object], field: str, facts: list[str], tmp_path: Path
) -> None:
    with refused(dm.ConfigError, field, *facts):
        call(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_artifact_has_no_slices() -> None:
    with pytest.raises(TypeError, match="slice"):
        dm.open_artifact(FULL)[:2]  # type: ignore[index]


def test_reprs_of_sources_and_results_fit_on_one_line(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.zeros((600, 2, 2), np.uint8), labels=np.arange(600))
    manifest = dm.open_artifact(FULL).manifest
    summary = dict.fromkeys(("encoder", "encoder_sha256", "original", "original_sha256", "plan_sha256"), "x" * 64)
    counts = {"steps": 400, "groups": 12800, "seconds": 31.4, "bytes": 1}
    found = {
        "600 samples": dm.open_source(tmp_path / "x.npz"),
        "4 groups in 2 shards, 1 of them new": dm.MergeResult(manifest, 1, (), 1.5, 1.0),
        "AT-5-Avg: 400 steps": dm.RunSummary(**summary, **counts, arm="AT-5-Avg", artifact="a", config=summary),
    }
    for fact, thing in found.items():
        assert fact in repr(thing)
        assert repr(thing) == str(thing)
        assert len(repr(thing)) < 120 + len(str(tmp_path))
