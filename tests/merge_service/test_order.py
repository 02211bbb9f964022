"""Shuffled shards: how many classes they hold, how many reads they take, and artifacts begun in another order."""

from __future__ import annotations

import io
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import datamerge as dm
from merge_service import MergeConfig
from merge_service.merge import Prepared, merge, prepare
from storage_schemas import ConfigError, NotAnArtifact, open_artifact
from tests.support.bench import tree
from tests.support.merging import merge_here
from tests.support.refusals import refused

ENCODER = "mlp:1x2x2-4-3"
CLASSES, PER_CLASS = 40, 5
ORDERS = ("source", "shuffled")


def _png(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (2, 2), np.uint8)
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of photos with a subfolder for each class."""
    root = tmp_path_factory.mktemp("data") / "photos"
    for label in range(CLASSES):
        (root / f"c{label:02d}").mkdir(parents=True)
        for number in range(PER_CLASS):
            (root / f"c{label:02d}" / f"{number}.png").write_bytes(_png(100 * label + number))
    return root


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classes in two Parquet files with row groups of 7 rows; the last of each file has 2."""
    root = tmp_path_factory.mktemp("data") / "rows"
    root.mkdir()
    labels = np.repeat(np.arange(CLASSES), PER_CLASS)
    for name, part in (("a", labels[:100]), ("b", labels[100:])):
        images = [{"bytes": _png(number), "path": None} for number in range(len(part))]
        pq.write_table(pa.table({"image": images, "label": part}), root / f"{name}.parquet", row_group_size=7)
    return root


def _config(source: Path, artifact: Path, **settings: Any) -> MergeConfig:
    usual: dict[str, Any] = {"groups_per_shard": 16, "device": "cpu"}
    if settings.get("grouping", "adversarial") == "adversarial":
        usual |= {"encoder": ENCODER, "members": 2, "steps": 1}
    return MergeConfig.model_validate(usual | {"source": str(source), "artifact": str(artifact)} | settings)


def _keys(prepared: Prepared) -> list[str]:
    return [group.key for shard in range(prepared.plan.layout.shards) for group in prepared.plan.groups_of(shard)]


def _classes_per_shard(prepared: Prepared) -> list[int]:
    """Number of distinct labels in every full shard."""
    shards = range(prepared.plan.layout.groups // prepared.plan.layout.groups_per_shard)
    return [len({group.label for group in prepared.plan.groups_of(shard)}) for shard in shards]


def test_shuffled_shards_hold_as_many_classes_as_random_draws(tmp_path: Path) -> None:
    labels = np.repeat(np.arange(1000), 4)
    np.savez(tmp_path / "x.npz", images=np.zeros((4000, 2, 2), np.uint8), labels=labels)
    shuffled = prepare(_config(tmp_path / "x.npz", tmp_path / "a", groups_per_shard=256))
    # 1000 · (1 − (1 − 1/1000)^256) = 226, ± 5.5; 64 in the order of the source.
    assert min(_classes_per_shard(shuffled)) > 195
    source = prepare(_config(tmp_path / "x.npz", tmp_path / "a", groups_per_shard=256, order="source"))
    assert max(_classes_per_shard(source)) <= 65
    assert sorted(_keys(shuffled)) == sorted(_keys(source))


@pytest.mark.parametrize(
    ("settings", "fewest"),
    [({}, 10), ({"grouping": "label", "members": 2}, 10), ({"grouping": "cluster", "clusters": 2}, 10)],
    ids=["adversarial", "label", "cluster"],
)
def test_the_seed_shuffles_groups_of_class_folders(
    folder: Path, tmp_path: Path, settings: dict[str, Any], fewest: int
) -> None:
    found = {
        (order, seed): prepare(
            _config(folder, tmp_path / "a", order=order, seed=seed, **settings), planning_only=True
        )
        for order in ORDERS
        for seed in (0, 1)
    }
    assert max(_classes_per_shard(found["source", 0])) <= 8
    assert min(_classes_per_shard(found["shuffled", 0])) >= fewest  # 13 to 14 of 40 are expected
    assert _keys(found["shuffled", 0]) != _keys(found["shuffled", 1])
    again = prepare(_config(folder, tmp_path / "a", **settings), planning_only=True)
    assert _keys(again) == _keys(found["shuffled", 0])
    members = [
        {group.key: [sample.key for sample in group.samples] for group in found[order, 0].plan.groups}
        for order in ORDERS
    ]
    assert members[0] == members[1]
    assert found["shuffled", 0].plan.provenance["order"] == "shuffled"
    assert "order" not in found["source", 0].plan.provenance


def test_groups_that_stay_in_source_order_are_not_recorded_as_shuffled(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes of 5 in row groups of 7: shuffled, the two classes of a shard would lie in different row groups."""
    settings = {"grouping": "label", "groups_per_shard": 2}
    shuffled, source = (
        prepare(_config(rows, tmp_path / order, order=order, **settings), planning_only=True)
        for order in ("shuffled", "source")
    )
    assert _keys(shuffled) == _keys(source)
    assert shuffled.plan.provenance == source.plan.provenance
    assert "row groups" in capsys.readouterr().err
    before = _merge_and_lose_shards(rows, tmp_path / "a", **settings)
    assert _resume(rows, tmp_path / "a", **settings) == before


def test_shuffling_reads_no_row_group_more_often(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads are counted in pyarrow: of workers that do one shard each, and of one that does all of them."""
    reads = Counter[tuple[Any, int]]()
    original = pq.ParquetFile.read_row_group

    def counted(file: Any, number: int, *arguments: Any, **more: Any) -> Any:
        reads[file.metadata.num_rows, number] += 1
        return original(file, number, *arguments, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    apart, together = {}, {}
    for order in ORDERS:
        prepared = prepare(_config(rows, tmp_path / "a", order=order))
        if order == "shuffled":
            assert min(_classes_per_shard(prepared)) >= 5  # 3 or 4 in the order of the source
        reads.clear()
        for shard in range(prepared.plan.layout.shards):
            reader = pickle.loads(pickle.dumps(prepared.source.reader))
            for sample in prepared.plan.task(shard).as_read():
                reader.read(sample)
        apart[order] = reads.copy()
        reads.clear()
        merge_here(_config(rows, tmp_path / order, order=order))
        together[order] = reads - Counter({(100, 0): 1})  # a read for the shape of the first image
    assert all(apart["shuffled"][block] <= apart["source"][block] for block in apart["source"])
    assert sum(together["shuffled"].values()) <= sum(together["source"].values())


@pytest.mark.parametrize("settings", [{}, {"grouping": "label", "members": 2}], ids=["adversarial", "label"])
def test_records_are_the_same_in_any_order(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    for order in ORDERS:
        merge_here(_config(folder, tmp_path / order, order=order, **settings))
    found = dm.diff(tmp_path / "source", tmp_path / "shuffled", tolerance=1e-6 if not settings else 0)
    assert found.equal
    assert found.settings == {"provenance.order": [None, "shuffled"]}


def test_records_of_a_shuffled_artifact_are_found_by_key(folder: Path, tmp_path: Path) -> None:
    merge(_config(folder, tmp_path / "a", grouping="label", members=2, max_workers=1))
    artifact = open_artifact(tmp_path / "a")
    assert (tmp_path / "a" / "keys.bin").exists()
    keys = [record.key for record in artifact]
    assert keys != sorted(keys)
    assert [artifact.index_of(key) for key in keys] == list(range(len(keys)))
    assert dm.verify(tmp_path / "a").problems == []


def _merge_and_lose_shards(source: Path, artifact: Path, **settings: Any) -> dict[str, bytes]:
    """Merge, then lose the last two shards; return the files as they were before the loss."""
    merge_here(_config(source, artifact, **settings))
    before = tree(artifact)
    sidecars = sorted((artifact / "commits").iterdir())
    for file in sidecars[-2:]:
        file.unlink()
    report = dm.verify(artifact, fix=True)
    assert len(report.problems) == 2
    return before


def _resume(source: Path, artifact: Path, **settings: Any) -> dict[str, bytes]:
    merge_here(_config(source, artifact, **settings))
    return tree(artifact)


def test_an_artifact_of_an_earlier_release_is_resumed_in_its_order(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its provenance has no order, and does not say whether its limit drew samples at random."""
    before = _merge_and_lose_shards(folder, tmp_path / "a", order="source", limit_first=60)
    capsys.readouterr()
    assert _resume(folder, tmp_path / "a", limit=60) == before
    said = [line for line in capsys.readouterr().err.splitlines() if "which is kept" in line]
    assert len(said) == 1
    assert all(fact in said[0] for fact in (str(tmp_path / "a"), "60"))
    assert _resume(folder, tmp_path / "a", order="source", limit_first=60) == before
    assert "which is kept" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("begun", "settings", "facts"),
    [
        ({"order": "source"}, {"order": "shuffled"}, ["order: None there", "'shuffled' now"]),
        ({}, {"order": "source"}, ["order: 'shuffled' there", "None now"]),
        ({"limit": 60}, {"limit_first": 60}, [f"source.drawn_from: {CLASSES * PER_CLASS} there", "None now"]),
        ({"limit_first": 60}, {"limit": 60}, ["source.drawn_from: None there", f"{CLASSES * PER_CLASS} now"]),
    ],
    ids=["shuffled after source", "source after shuffled", "first after drawn", "drawn after first"],
)
def test_another_order_or_limit_is_refused(
    folder: Path, tmp_path: Path, begun: dict[str, Any], settings: dict[str, Any], facts: list[str]
) -> None:
    before = _merge_and_lose_shards(folder, tmp_path / "a", **begun)
    found = tree(tmp_path / "a")
    with refused(NotAnArtifact, None, *facts):
        _resume(folder, tmp_path / "a", **settings)
    assert tree(tmp_path / "a") == found
    assert _resume(folder, tmp_path / "a", **begun) == before


def test_limit_draws_from_every_class_and_limit_first_takes_the_first(folder: Path, tmp_path: Path) -> None:
    prepared = prepare(_config(folder, tmp_path / "a", limit=CLASSES))
    assert Counter(group.label for group in prepared.plan.groups) == dict.fromkeys(range(CLASSES), 1)
    assert prepared.plan.provenance["source"]["drawn_from"] == CLASSES * PER_CLASS
    first = prepare(_config(folder, tmp_path / "a", limit_first=7, order="source"))
    assert _keys(first) == [f"c{number // 5:02d}_{number % 5}" for number in range(7)]
    assert "drawn_from" not in first.plan.provenance["source"]
    with refused(ConfigError, "limit_first", "limit"):
        _config(folder, tmp_path / "a", limit=3, limit_first=3)
    with refused(ConfigError, "limit_first", "limit"):
        dm.EvaluateConfig(runs=["x"], data=str(folder), limit=3, limit_first=3)


def test_artifacts_in_different_orders_combine_by_key(folder: Path, tmp_path: Path) -> None:
    """Rounds have different seeds, and therefore different orders."""
    for seed in (0, 1):
        merge_here(_config(folder, tmp_path / str(seed), seed=seed, keep_members=True))
    dm.combine([tmp_path / "0", tmp_path / "1"], tmp_path / "both")
    parts, both = [open_artifact(tmp_path / name) for name in ("0", "1")], open_artifact(tmp_path / "both")
    assert [record.key for record in both] == [record.key for record in parts[0]]
    for record in both:
        members = np.concatenate([part[record.key].members for part in parts])
        np.testing.assert_array_equal(record.members, members)
