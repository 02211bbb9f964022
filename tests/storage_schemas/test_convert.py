"""Conversions between formats and encodings: byte for byte what a direct writer makes, exact or refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from storage_schemas import (
    ArraySpec,
    ArtifactWriter,
    DatamergeError,
    ExactMoments,
    Layout,
    Location,
    NotAnArtifact,
    Record,
    SchemaError,
    UserError,
    open_artifact,
)
from storage_schemas.card.finish import finish
from storage_schemas.operations.convert import convert
from storage_schemas.schema.exact import exact_moments, pixel_spread
from storage_schemas.schema.record import encode_exact
from tests.support.refusals import refused

Write = Callable[..., list[Record]]
Same = Callable[[Record, Record], None]
FORMS = [(format, encoding) for format in ("zarr", "webdataset") for encoding in ("uint8_moments", "float32")]
HEAD = {"head.safetensors": save({"weight": np.zeros((2, 6), np.float32)})}


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _write(folder: Path, layout: Layout, write: Write, rejected: tuple[int, ...]) -> list[Record]:
    """Write an artifact with all the files that a merge writes."""
    records = write(folder, layout, rejected, HEAD)
    artifact = open_artifact(folder)
    writer = ArtifactWriter(Location(folder), layout, artifact.manifest.provenance)
    finish(writer)
    return records


@pytest.mark.parametrize("extras", [("target",), ("target", "members", "clean")])
@pytest.mark.parametrize("source", FORMS)
@pytest.mark.parametrize("target", FORMS)
def test_every_conversion_equals_a_direct_write(
    tmp_path: Path,
    make_layout: Callable[..., Layout],
    write_artifact: Write,
    same_record: Same,
    source: tuple[str, str],
    target: tuple[str, str],
    extras: tuple[str, ...],
) -> None:
    _write(tmp_path / "a", make_layout(*source, extras), write_artifact, (1,))
    expected = _write(tmp_path / "expected", make_layout(*target, extras), write_artifact, (1,))
    counts: list[int] = []
    manifest = convert(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), *target, counts.append)  # type: ignore[arg-type]
    assert manifest.complete
    assert sum(counts) == 7
    converted = open_artifact(tmp_path / "b")
    assert [commit.rejects for commit in map(converted.commit, range(3))] == [
        commit.rejects for commit in map(open_artifact(tmp_path / "expected").commit, range(3))
    ]
    for found, record in zip(converted, expected, strict=True):
        same_record(found, record)
    if source[1] == target[1] or target[1] == "float32":
        assert _tree(tmp_path / "b") == _tree(tmp_path / "expected")


def test_an_interrupted_conversion_is_continued(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    artifact = open_artifact(tmp_path / "a")
    convert(artifact, Location(tmp_path / "golden"), "webdataset", "uint8_moments")
    commits: list[int] = []
    original = ArtifactWriter.commit

    def commit(self: ArtifactWriter, shard: int, *rest: Any) -> Any:
        commits.append(shard)
        if len(commits) == 2:
            raise KeyboardInterrupt
        return original(self, shard, *rest)

    monkeypatch.setattr(ArtifactWriter, "commit", commit)
    with pytest.raises(KeyboardInterrupt):
        convert(artifact, Location(tmp_path / "b"), "webdataset", "uint8_moments")
    with refused(NotAnArtifact, None, tmp_path / "b", "0 of 3"):
        open_artifact(tmp_path / "b")
    convert(artifact, Location(tmp_path / "b"), "webdataset", "uint8_moments")
    assert commits == [0, 1, 1, 2]
    assert _tree(tmp_path / "b") == _tree(tmp_path / "golden")
    before = _tree(tmp_path / "b")
    convert(artifact, Location(tmp_path / "b"), "webdataset", "uint8_moments")
    assert len(commits) == 4
    assert _tree(tmp_path / "b") == before


def test_a_target_that_holds_another_artifact_is_refused(
    tmp_path: Path, make_layout: Callable[..., Layout], write_artifact: Write
) -> None:
    write_artifact(tmp_path / "a", make_layout("zarr"))
    artifact = open_artifact(tmp_path / "a")
    before = _tree(tmp_path / "a")
    with refused(NotAnArtifact, None, tmp_path / "a", "layout.format", "'zarr'", "'webdataset'"):
        convert(artifact, Location(tmp_path / "a"), "webdataset", "uint8_moments")
    assert _tree(tmp_path / "a") == before


def _float32_artifact(folder: Path, records: list[tuple[int, Any, Any]], provenance: dict[str, Any]) -> None:
    shape = records[0][1].shape
    layout = Layout(
        format="zarr",
        encoding="float32",
        arrays=tuple(ArraySpec.of(name, np.dtype("f4"), shape) for name in ("mean", "mean_square")),
        groups=len(records),
        groups_per_shard=2,
    )
    writer = ArtifactWriter(Location(folder), layout, provenance)
    writer.begin({})
    rows = [
        Record(f"k{i}", count, "float32", {"mean": np.asarray(mean, "f4"), "mean_square": np.asarray(square, "f4")})
        for i, (count, mean, square) in enumerate(records)
    ]
    for shard in range(layout.shards):
        writer.commit(shard, rows[2 * shard : 2 * shard + 2], [])
    writer.finish()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 4, 255]))
def test_exact_integers_are_recovered_from_float32_moments(count: int, seed: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, 256, (1, 3, 5, 7))
    members = np.clip(clean + rng.integers(-spread, spread + 1, (count, 3, 5, 7)), 0, 255).astype(np.uint8)
    moments = ExactMoments.of(members)
    arrays: dict[str, Any] = {"mean": np.float32(moments.mean), "mean_square": np.float32(moments.mean_square)}
    found = exact_moments(Record("k", count, "float32", arrays), "a")
    np.testing.assert_array_equal(found.sum, moments.sum)
    np.testing.assert_array_equal(found.sum_of_squares, moments.sum_of_squares)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6000), st.integers(0, 2**32 - 1))
def test_sums_of_squares_are_recovered_from_scatters(count: int, seed: int) -> None:
    members = np.random.default_rng(seed).integers(0, 256, (count, 1, 2, 3)).astype(np.uint8)
    moments = ExactMoments.of(members)
    arrays: dict[str, Any] = {"sum": moments.sum.astype(np.uint32), "scatter": moments.scatter.astype(np.uint64)}
    found = exact_moments(Record("k", count, "uint8_moments", arrays), "a")
    np.testing.assert_array_equal(found.sum_of_squares, moments.sum_of_squares)


@pytest.mark.parametrize("off", ["mean", "mean_square", "negative variance"])
def test_values_off_the_grid_are_refused_before_anything_is_written(
    tmp_path: Path, provenance: dict[str, Any], off: str
) -> None:
    """Only the last record is wrong: by one unit in the last place, or with a negative variance."""
    members = np.random.default_rng(3).integers(0, 256, (4, 1, 3, 3)).astype(np.uint8)
    moments = ExactMoments.of(members)
    good: tuple[int, Any, Any] = (4, np.float32(moments.mean), np.float32(moments.mean_square))
    bad: list[Any] = [good[0], good[1].copy(), good[2].copy()]
    if off == "negative variance":
        bad[2][0, 1, 1] = np.float32(0)
        bad[1][0, 1, 1] = np.float32(200 / 255 / 4)
    else:
        array = bad[1 if off == "mean" else 2]
        array[0, 1, 1] = np.nextafter(array[0, 1, 1], np.float32(1))
    _float32_artifact(tmp_path / "a", [good, good, good, tuple(bad)], provenance)
    with refused(UserError, None, tmp_path / "a", "k3: ", "8-bit", "float32"):
        convert(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), "zarr", "uint8_moments")
    assert not (tmp_path / "b").exists()


def test_groups_too_large_for_float32_are_refused(tmp_path: Path, provenance: dict[str, Any]) -> None:
    """6,000 members: many integers round to one float32."""
    members = np.random.default_rng(4).integers(0, 256, (6000, 1, 2, 2)).astype(np.uint8)
    moments = ExactMoments.of(members)
    _float32_artifact(tmp_path / "a", [(6000, moments.mean, moments.mean_square)], provenance)
    with refused(UserError, None, "k0: ", "mean_square", 6000, '`encoding="uint8_moments"`'):
        convert(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), "zarr", "uint8_moments")


def test_impossible_integers_are_an_error() -> None:
    arrays = {"sum": np.array([[[3]]], np.uint16), "scatter": np.array([[[2]]], np.uint16)}
    with refused(DatamergeError, None, "a: record k: ", "sum", "scatter", " 4 "):
        exact_moments(Record("k", 4, "uint8_moments", arrays), "a")


def test_the_dtypes_are_those_that_the_merge_plans(tmp_path: Path) -> None:
    """Ten members within 2/255 of a photo fit 16 bits; a conversion from float32 gives them 16 bits again."""
    rng = np.random.default_rng(5)
    clean = rng.integers(2, 254, (3, 4, 4))
    members = (clean + rng.integers(-2, 3, (10, 3, 4, 4))).astype(np.uint8)
    moments = ExactMoments.of(members)
    provenance = {"attack": {"epsilon": "2/255"}, "grouping": {"members": 10}}
    assert pixel_spread(provenance) == 4
    assert pixel_spread({"attack": {"epsilon": "0.9"}}) == pixel_spread({}) == 255
    for epsilon in ("1e999999999", "1/1e-999999999", "9" * 10**6, "2/0", "-1/255", "two"):
        with refused(SchemaError, None, "attack.epsilon: ", epsilon[:70]):
            pixel_spread({"attack": {"epsilon": epsilon}})
    _float32_artifact(tmp_path / "a", [(10, moments.mean, moments.mean_square)], provenance)
    convert(open_artifact(tmp_path / "a"), Location(tmp_path / "b"), "webdataset", "uint8_moments")
    converted = open_artifact(tmp_path / "b")
    assert [spec.dtype for spec in converted.manifest.layout.arrays] == ["uint16", "uint16"]
    for name, expected in encode_exact(moments, converted.manifest.layout).items():
        np.testing.assert_array_equal(converted[0].arrays[name], expected)


def test_peak_memory_does_not_grow_with_shards(
    tmp_path: Path, make_layout: Callable[..., Layout], make_record: Any
) -> None:
    peaks = []
    for groups in (6, 48):
        layout = make_layout("webdataset", groups=groups)
        layout = layout.model_copy(
            update={
                "arrays": (
                    ArraySpec.of("sum", np.dtype("u2"), (3, 128, 128)),
                    ArraySpec.of("scatter", np.dtype("u4"), (3, 128, 128)),
                )
            }
        )
        writer = ArtifactWriter(Location(tmp_path / f"a{groups}"), layout, {})
        writer.begin({})
        members = np.random.default_rng(0).integers(0, 256, (4, 3, 128, 128)).astype(np.uint8)
        arrays = encode_exact(ExactMoments.of(members), layout)
        for shard in range(layout.shards):
            writer.commit(shard, [Record(f"k{3 * shard + i}", 4, "uint8_moments", arrays) for i in range(3)], [])
        writer.finish()
        artifact = open_artifact(tmp_path / f"a{groups}")
        tracemalloc.start()
        convert(artifact, Location(tmp_path / f"b{groups}"), "webdataset", "float32")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
