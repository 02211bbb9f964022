"""Contents of groups against float64 moments: in one piece, in parts on a cluster, and on full data sets."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import ray
import torch
from PIL import Image

from datamerge.encoders import load_encoder
from datamerge.runtime.options import as_flags
from datamerge.sources import open_source
from merge_service import MergeConfig, merge, planning
from merge_service.cli import merge as command
from merge_service.clustering import cluster_class, from_bytes
from merge_service.merge import prepare, worker_setup
from merge_service.reading import PixelReader
from merge_service.worker import ShardWorker
from storage_schemas import (
    ArtifactWriter,
    ConfigError,
    DatamergeError,
    Location,
    NotAnArtifact,
    Record,
    SourceError,
    open_artifact,
)
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.bench import Bench, tree
from tests.support.merging import merge_here
from tests.support.refusals import refused

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::FutureWarning")

Pixels = npt.NDArray[np.uint8]

COUNT = 60
RNG = np.random.default_rng(0)
LABELS = RNG.integers(0, 3, COUNT)
# Every class has two kinds of images that lie far apart: bright and dark.
BRIGHT = RNG.integers(0, 2, COUNT)
IMAGES = (RNG.integers(0, 60, (COUNT, 6, 5)) + 150 * BRIGHT[:, None, None]).astype(np.uint8)
ENCODER = "mlp:1x6x5-8-4"


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    site = np.array([f"site {number % 4}" for number in range(COUNT)])
    np.savez(path, images=IMAGES, labels=LABELS, site=site, single=LABELS)
    return path


def _config(digits: Path, artifact: Path, **settings: Any) -> MergeConfig:
    return MergeConfig.model_validate(
        {"source": str(digits), "artifact": str(artifact), "grouping": "label", "device": "cpu"} | settings
    )


def _check_moments(record: Record, indices: npt.NDArray[np.intp]) -> None:
    """Mean and variance of these images, in float64."""
    members = IMAGES[indices][:, None] / 255
    assert record.count == len(indices)
    np.testing.assert_allclose(record.mean, members.mean(axis=0), atol=1e-7)
    np.testing.assert_allclose(record.variance, members.var(axis=0), atol=1e-7)
    assert sorted(record.samples) == sorted(f"digits.npz#{index}" for index in indices)


def test_groups_of_whole_classes_have_the_moments_of_their_images(digits: Path, tmp_path: Path) -> None:
    artifact = merge_here(_config(digits, tmp_path / "a"))
    assert sorted(str(record.label) for record in artifact) == ["0", "1", "2"]
    for record in artifact:
        _check_moments(record, np.flatnonzero(record.label == LABELS))
        assert record.target is None


def test_members_splits_classes_into_random_groups(digits: Path, tmp_path: Path) -> None:
    """Every sample is in one group, in random order; the stored members are the images of the group."""
    artifact = merge_here(_config(digits, tmp_path / "a", members=4, keep_members=True, groups_per_shard=3))
    names = [name for record in artifact for name in record.samples]
    assert sorted(names) == sorted(f"digits.npz#{index}" for index in range(COUNT))
    assert names != sorted(names)
    for record in artifact:
        indices = np.array([int(name.rpartition("#")[2]) for name in record.samples])
        assert set(LABELS[indices]) == {record.label}
        _check_moments(record, indices)
        assert record.members is not None
        np.testing.assert_array_equal(record.members[:, 0], IMAGES[indices])


def test_groups_of_a_column_have_moments_targets_and_labels(digits: Path, tmp_path: Path) -> None:
    settings = {"grouping": "column", "group_column": "site", "label_column": "labels"}
    artifact = merge_here(_config(digits, tmp_path / "a", **settings, targets="embedding", encoder=ENCODER))
    encoder = load_encoder(ENCODER)
    assert len({record.key for record in artifact}) == 4
    for record in artifact:
        indices = np.array([int(name.rpartition("#")[2]) for name in record.samples])
        assert len(set(indices % 4)) == 1
        _check_moments(record, indices)
        assert record.label is None  # the classes are mixed
        with torch.no_grad():
            expected = encoder(torch.from_numpy(IMAGES[indices][:, None]).float() / 255).double().mean(0)
        assert record.target is not None
        np.testing.assert_allclose(record.target, expected, atol=1e-5)
    with refused(ConfigError, "group_column", "'site 0'", "'site'"):
        prepare(_config(digits, tmp_path / "b", **settings))
    same = prepare(_config(digits, tmp_path / "b", grouping="column", group_column="single"))
    assert sorted(str(group.label) for group in same.plan.groups) == ["0", "1", "2"]


def test_both_targets_are_stored(digits: Path, tmp_path: Path) -> None:
    artifact = merge_here(_config(digits, tmp_path / "a", targets="both", encoder=ENCODER))
    assert all(record.target is not None and record.label is not None for record in artifact)


def test_an_adversarial_merge_with_label_targets_stores_the_head_once(digits: Path, tmp_path: Path) -> None:
    from datamerge.encoders import Head

    (tmp_path / "head.safetensors").write_bytes(Head(torch.eye(3, 4), names=["a", "b", "c"]).to_bytes())
    settings = {
        "grouping": "adversarial",
        "encoder": ENCODER,
        "members": 2,
        "steps": 2,
        "limit_first": 4,
        "order": "source",
    }
    settings |= {"objective": "cross_entropy", "head": str(tmp_path / "head.safetensors")}
    for targets, stored in (("label", False), (None, True)):
        more = {"targets": targets} if targets else {}
        artifact = merge_here(_config(digits, tmp_path / f"a-{targets}", **settings, **more))
        assert [record.label for record in artifact] == LABELS[:4].tolist()
        assert [record.target is not None for record in artifact] == [stored] * 4
        head = artifact.head()
        assert head is not None
        assert head[1] == ["a", "b", "c"]


@pytest.mark.parametrize("attack", ["apgd", "pgd"])
def test_attack_options_reach_the_attack(digits: Path, tmp_path: Path, attack: str) -> None:
    base = {
        "grouping": "adversarial",
        "encoder": ENCODER,
        "members": 2,
        "steps": 4,
        "limit_first": 6,
        "attack": attack,
    }
    plain = merge_here(_config(digits, tmp_path / "a", **base))
    strong = merge_here(_config(digits, tmp_path / "b", **base, restarts=4))
    for one, four in zip(plain, strong, strict=True):
        assert four.info["attack_loss"] >= one.info["attack_loss"]
    assert any(four.info["attack_loss"] > one.info["attack_loss"] for one, four in zip(plain, strong, strict=True))
    narrow = merge_here(_config(digits, tmp_path / "c", **base | {"steps": 0}, start_radius="1/255"))
    assert narrow.manifest.provenance["attack"]["kind"] == attack  # type: ignore[index,call-overload]
    for record in narrow:
        assert record.variance.max() <= (1 / 255) ** 2 * 1.0001  # ±1 level at most


def test_the_provenance_has_a_start_radius_only_with_a_random_start(digits: Path, tmp_path: Path) -> None:
    base = {"grouping": "adversarial", "encoder": ENCODER, "members": 1, "objective": "cross_entropy"}
    for settings, radius in (({}, "2/255"), ({"start_radius": "1/255"}, "1/255"), ({"random_start": False}, None)):
        attack = prepare(_config(digits, tmp_path / "a", **base | settings)).plan.provenance["attack"]
        assert attack.get("start_radius") == radius
        assert attack["random_start"] is (radius is not None)


def test_low_precision_is_compared_with_float32(digits: Path, tmp_path: Path) -> None:
    """The message compares gradient signs and attack losses of the first batch; float32 agrees with itself."""
    base = {"grouping": "adversarial", "encoder": ENCODER, "members": 2, "steps": 4, "limit_first": 6}
    lines = {}
    for precision in ("bfloat16", "float32"):
        prepared = prepare(_config(digits, tmp_path / precision, **base, precision=precision))
        writer = ArtifactWriter(Location(tmp_path / precision), prepared.plan.layout, prepared.plan.provenance)
        worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
        threads = torch.get_num_threads()
        worker.prepare()
        lines[precision] = worker.check_precision(prepared.plan.task(0))
        torch.set_num_threads(threads)
    pattern = r"([0-9.]+) % of gradient signs as in float32; .* \(([0-9.]+) %\), on 12 images"
    found = re.search(pattern, lines["bfloat16"])
    assert found is not None, lines
    assert 80 < float(found[1]) <= 100
    assert 90 < float(found[2]) < 110
    assert "100.0 % of gradient signs" in lines["float32"]
    assert "(100.0 %)" in lines["float32"]


def test_parts_on_a_cluster_give_the_bytes_of_one_piece(
    bench: Bench, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers do the many work items of a class, in any order."""
    bench.switch()
    whole = merge_here(_config(digits, tmp_path / "whole"))
    monkeypatch.setattr(planning, "PART_SAMPLES", 7)
    merge(_config(digits, tmp_path / "parts", ray_address=bench.address))
    parts, golden = tree(tmp_path / "parts"), tree(tmp_path / "whole")
    assert {name: data for name, data in parts.items() if name in golden and name != "manifest.json"} == {
        name: data for name, data in golden.items() if name != "manifest.json"
    }
    assert len(whole) == 3


def test_clusters_separate_distant_images(
    bench: Bench, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two kinds of every class become two groups; the assignment is stored, and a resumed merge uses it.

    Clustering and shards share one connection to Ray, and a finished artifact needs none.
    """
    bench.switch()
    init = Mock(wraps=ray.init)
    monkeypatch.setattr("ray.init", init)
    config = _config(digits, tmp_path / "a", grouping="cluster", clusters=2, ray_address=bench.address)
    merge(config)
    artifact = open_artifact(tmp_path / "a")
    assert len(artifact) == 6
    for record in artifact:
        indices = np.array([int(name.rpartition("#")[2]) for name in record.samples])
        assert len(set(LABELS[indices])) == 1
        assert len(set(BRIGHT[indices])) == 1
        _check_moments(record, indices)
    before = tree(tmp_path / "a")
    kept = json.loads(before["clusters.json"])
    assert {label: len(found) for label, found in kept["clusters"].items()} == {
        str(label): int(np.count_nonzero(label == LABELS)) for label in range(3)
    }
    assert merge(config).merged_shards == 0
    assert tree(tmp_path / "a") == before
    assert init.call_count == 1


@pytest.mark.parametrize("space", ["pixels", "embedding"])
def test_clusters_do_not_depend_on_threads(digits: Path, space: str) -> None:
    import threadpoolctl

    source = open_source(digits)
    reader = PixelReader(source.reader, Preprocessing(shape=(1, 6, 5)), 1)
    encoder = load_encoder(ENCODER) if space == "embedding" else None
    found = []
    for threads in (1, 4):
        with threadpoolctl.threadpool_limits(threads):
            found.append(cluster_class(source.samples, 5, (0, 1), reader, encoder, 16))
    assert found[0] == found[1]
    assert set(found[0]) == set(range(5))
    assert sorted(cluster_class(source.samples[:3], 5, (0, 1), reader, encoder, 16)) == [0, 1, 2]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"identity": "id", "clusters": {"1": [1e999]}}'])
def test_a_damaged_assignment_reads_as_none(text: str) -> None:
    assert from_bytes(b'{"identity": "id", "clusters": {"1": [1]}}', "id") == {1: [1]}
    assert from_bytes(text.encode(), "id") is None


def test_a_changed_source_is_refused_with_the_difference(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for name, value in (("a/1", 10), ("a/2", 20), ("b/3", 30)):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)
    config = MergeConfig(source=str(folder), artifact=str(tmp_path / "x"), grouping="label")
    merge_here(config)
    prepare(config)
    (folder / "b" / "3.png").rename(folder / "b" / "4.png")
    Image.fromarray(np.full((4, 4), 99, np.uint8)).save(folder / "a" / "1.png")
    with refused(SourceError, None, folder, tmp_path / "x", "b/3.png", "b/4.png", "a/1.png"):
        prepare(config)
    (folder / "b" / "4.png").rename(folder / "b" / "3.png")
    Image.fromarray(np.full((4, 4), 10, np.uint8)).save(folder / "a" / "1.png")
    with refused(NotAnArtifact, None, tmp_path / "x", "seed: 0 ", " 1 "):
        merge_here(config.model_copy(update={"seed": 1}))


def test_a_source_without_usable_images_is_an_error(bench: Bench, tmp_path: Path) -> None:
    bench.switch()
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4), np.uint8), labels=[0, 0])
    config = _config(tmp_path / "x.npz", tmp_path / "a", shape="1x6x5", resize=False, ray_address=bench.address)
    with refused(DatamergeError, None, f"`datamerge inspect {tmp_path / 'a'}`"):
        merge(config)


def _class_means(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Means and counts of the classes of an image table, by pyarrow and NumPy alone."""
    table = pq.read_table(path)
    labels = np.array(table["label"])
    images = np.stack([np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in table["image"].to_pylist()])
    if images.ndim == 3:
        images = images[..., None]
    means = np.stack([images[labels == label].mean(axis=0).transpose(2, 0, 1) for label in range(10)]) / 255
    return means, np.bincount(labels)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_class_means_of_whole_data_sets(bench: Bench, tmp_path: Path, name: str) -> None:
    """The 10,000 test images; training sets would add time and no other case."""
    if "DATAMERGE_DATA" not in os.environ:
        pytest.skip("DATAMERGE_DATA is not set")
    bench.switch()
    path = Path(os.environ["DATAMERGE_DATA"]) / name / "test.parquet"
    merge(_config(path, tmp_path / "a", ray_address=bench.address))
    means, counts = _class_means(path)
    artifact = open_artifact(tmp_path / "a")
    assert {record.label for record in artifact} == set(range(10))
    for record in artifact:
        assert record.count == counts[record.label or 0]
        np.testing.assert_allclose(record.mean, means[record.label or 0], atol=1e-6)


ADVERSARIAL = {"grouping": "adversarial", "encoder": ENCODER}
BAD_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"grouping": "cluster"}, "clusters"),
    ({"grouping": "cluster", "clusters": 2, "members": 3}, "clusters"),
    ({"clusters": 2}, "clusters"),
    ({"cluster_by": "embedding"}, "cluster_by"),
    ({"grouping": "column"}, "group_column"),
    ({"grouping": "column", "group_column": "x", "members": 2}, "members"),
    ({"group_column": "x"}, "group_column"),
    ({"keep_clean": True}, "keep_clean"),
    ({"keep_members": True}, "keep_members"),
    ({"grouping": "cluster", "clusters": 2, "keep_members": True}, "keep_members"),
    ({"encoder": ENCODER}, "encoder"),
    ({"targets": "embedding"}, "encoder"),
    ({"grouping": "adversarial"}, "encoder"),
    ({"grouping": "cluster", "clusters": 2, "cluster_by": "embedding"}, "encoder"),
    ({"grouping": "adversarial", "encoder": ENCODER, "shape": "3x4x4"}, "shape"),
    ({"target_encoder": ENCODER, "targets": "both", "encoder": ENCODER}, "target_encoder"),
    ({**ADVERSARIAL, "random_start": False, "start_radius": "1/255"}, "start_radius"),
    ({**ADVERSARIAL, "start_radius": "3/255"}, "start_radius"),
    ({**ADVERSARIAL, "step_size": "0"}, "step_size"),
    ({**ADVERSARIAL, "random_start": False, "restarts": 2}, "restarts"),
    ({"grid": False, "encoding": "uint8_moments"}, "encoding"),
    ({"grid": False, "keep_members": True, "members": 2}, "keep_members"),
    ({"factors": 1}, "factors"),
    ({"grouping": "adversarial", "encoder": ENCODER, "members": 3, "factors": 3}, "factors"),
    ({"factor_kind": "principal"}, "factor_kind"),
    ({"epsilon": "3"}, "epsilon"),
    ({"precision": "bf16"}, "precision"),
    ({"on_grid": True}, "on_grid"),
    ({"license": "any kind"}, "license"),
    ({"max_rejected": -1}, "max_rejected"),
]


@pytest.mark.parametrize(("settings", "field"), BAD_SETTINGS, ids=str)
def test_settings_that_do_not_go_together_are_refused(
    digits: Path, tmp_path: Path, settings: dict[str, Any], field: str
) -> None:
    """The one-line error begins with its field; settings are in backquotes, which the command turns into flags."""
    with refused(ConfigError, field) as caught:
        _config(digits, tmp_path / "a", **settings)
    assert str(caught.value).startswith(f"{field}: ")
    assert "--" not in str(caught.value)
    shown = as_flags(str(caught.value))
    assert shown.startswith(f"--{field.replace('_', '-')}: ") or field not in MergeConfig.model_fields
    assert "`" not in shown
    spellings = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
    assert set(re.findall(r"--[a-z-]+", shown)) <= spellings
