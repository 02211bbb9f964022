"""Merges without an attack: the mean of a group is its image, the target the embedding of the image."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from click.testing import CliRunner

import datamerge as dm
from datamerge.encoders import Head, load_encoder
from datamerge.tools.inspection import inspect
from merge_service import MergeConfig, merge
from merge_service.cli import merge as command
from merge_service.merge import prepare, worker_setup
from merge_service.stored_arrays import image_arrays
from merge_service.worker import ShardWorker
from storage_schemas import (
    Artifact,
    ArtifactWriter,
    ConfigError,
    ExactMoments,
    Layout,
    Location,
    encode_exact,
    moment_specs,
    open_artifact,
)
from storage_schemas.card.dataset_card import dataset_card
from storage_schemas.schema.manifest import EncodingName
from storage_schemas.verify import verify
from tests.support.bench import Bench, tree
from tests.support.merging import merge_here
from tests.support.refusals import refused

ENCODER = "mlp:3x8x8-16-4"
GROUPS = 11

Pixels = npt.NDArray[np.uint8]
Merge = Callable[..., Artifact]


@pytest.fixture
def images() -> Pixels:
    levels = np.random.default_rng(0).integers(0, 256, (GROUPS, 8, 8, 3), np.uint8)
    levels[0] = np.arange(8 * 8 * 3).reshape(8, 8, 3)
    levels[1] = 255 - levels[0]  # every grey level is in these two
    return levels


@pytest.fixture
def photos(images: Pixels, tmp_path: Path) -> Path:
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(GROUPS) % 3)
    return tmp_path / "x.npz"


@pytest.fixture
def made(photos: Path, tmp_path: Path) -> Merge:
    """A function that merges without an attack; `settings` override the usual ones."""

    def merged(name: str, **settings: Any) -> Artifact:
        places = {"source": str(photos), "artifact": str(tmp_path / name), "device": "cpu", "groups_per_shard": 4}
        return merge_here(MergeConfig.model_validate(places | {"encoder": ENCODER, "attack": "none"} | settings))

    return merged


@pytest.mark.parametrize("encoding", ["uint8_moments", "float32"])
def test_arrays_of_an_image_equal_those_of_a_group_of_one(encoding: EncodingName) -> None:
    image = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    specs = tuple(moment_specs(encoding, image.shape, 1, 255))
    layout = Layout(format="zarr", encoding=encoding, arrays=specs, groups=1, groups_per_shard=1)
    expected, found = encode_exact(ExactMoments.of(image[None]), layout), image_arrays(image, layout)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("encoding", ["uint8_moments", "float32"])
@pytest.mark.parametrize("format", ["zarr", "webdataset"])
def test_the_mean_is_the_image_and_the_target_equals_that_of_an_attack(
    made: Merge, images: Pixels, format: str, encoding: str
) -> None:
    stored = {"format": format, "encoding": encoding}
    found = made("none", batch_size=2, **stored)
    # Two groups of three members, so that its batches too have two clean images.
    attacked = made("attacked", attack="pgd", steps=1, members=3, batch_size=6, keep_clean=True, **stored)
    assert [record.key for record in found] == [record.key for record in attacked]
    encoder = load_encoder(ENCODER)
    for record, other in zip(found, attacked, strict=True):
        image = images[int(record.samples[0].rpartition("#")[2])].transpose(2, 0, 1)
        np.testing.assert_array_equal(record.mean, (image / 255).astype(np.float32))
        # float32 squares are rounded, to half a unit in the last place of 1.
        assert record.variance.max() <= (0 if encoding == "uint8_moments" else 2**-24)
        assert (record.count, record.label, record.samples) == (1, other.label, other.samples)
        assert (record.info, record.clean, record.members, record.factors) == ({}, None, None, None)
        np.testing.assert_array_equal(image, other.clean)
        np.testing.assert_array_equal(record.target, other.target)
        with torch.no_grad():
            embedding = encoder(torch.from_numpy(image)[None].float() / 255)[0]
        assert record.target is not None
        np.testing.assert_allclose(record.target, embedding, atol=1e-6)
    provenance = found.manifest.provenance
    assert provenance["attack"] is None
    assert provenance["grouping"] == {"kind": "adversarial", "members": 1}
    assert provenance["encoder"] == attacked.manifest.provenance["encoder"]
    assert found.manifest.layout.groups_per_shard == 4
    assert not verify(found.location).problems


@pytest.mark.parametrize("targets", ["label", "both"])
def test_targets_are_labels_or_both(made: Merge, targets: str) -> None:
    found = made("none", targets=targets, **({"encoder": None} if targets == "label" else {}))
    assert found.manifest.provenance["targets"] == targets
    assert ("encoder" in found.manifest.provenance) == (targets == "both")
    for record in found:
        assert record.label == int(record.samples[0].rpartition("#")[2]) % 3
        assert (record.target is None) == (targets == "label")


def test_a_head_is_stored_and_gives_the_labels(made: Merge, images: Pixels, tmp_path: Path) -> None:
    names = np.array(["dog", "ant"])[np.arange(GROUPS) % 2]
    np.savez(tmp_path / "named.npz", images=images, labels=names)
    (tmp_path / "head.safetensors").write_bytes(Head(torch.eye(3, 4), names=["cat", "dog", "ant"]).to_bytes())
    places = {"source": str(tmp_path / "named.npz"), "head": str(tmp_path / "head.safetensors")}
    found = made("none", targets="both", **places)
    head = found.head()
    assert head is not None
    assert head[1] == ["cat", "dog", "ant"]
    for record in found:
        assert record.label == 1 + int(record.samples[0].rpartition("#")[2]) % 2
        assert record.target is not None


def test_images_of_several_groups_share_an_encoder_batch(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = {"source": str(photos), "artifact": str(tmp_path / "out"), "device": "cpu", "order": "source"}
    config = MergeConfig.model_validate({**places, "attack": "none", "encoder": ENCODER, "batch_size": 4})
    prepared = prepare(config)
    writer = ArtifactWriter(Location(config.artifact), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    threads = torch.get_num_threads()
    worker.prepare()
    assert worker.model is not None
    seen: list[tuple[int, bool]] = []
    worker.model.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    worker.run(prepared.plan.task(0))
    torch.set_num_threads(threads)
    assert seen == [(4, False), (4, False), (3, False)]


def test_a_resumed_merge_on_ray_writes_the_bytes_of_a_loop_over_shards(bench: Bench, tmp_path: Path) -> None:
    """The embedding of one photo is not finite."""

    def config(name: str) -> MergeConfig:
        return MergeConfig(
            source=str(bench.photos),
            artifact=str(tmp_path / name),
            attack="none",
            encoder="python:faulty:encoder",
            resize=False,
            groups_per_shard=6,
            batch_size=3,
            device="cpu",
            ray_address=bench.address,
        )

    merge_here(config("loop"))
    assert merge(config("loop")).merged_shards == 0
    prepared = prepare(config("ray"))
    writer = ArtifactWriter(Location(tmp_path / "ray"), prepared.plan.layout, prepared.plan.provenance)
    writer.begin(prepared.files)
    worker = ShardWorker(worker_setup(prepared, writer, "cpu"))
    threads = torch.get_num_threads()
    worker.prepare()
    worker.run(prepared.plan.task(1))
    torch.set_num_threads(threads)
    assert merge(config("ray")).merged_shards == prepared.plan.layout.shards - 1
    assert tree(tmp_path / "ray") == tree(tmp_path / "loop")
    artifact = open_artifact(tmp_path / "ray")
    rejects = {
        reject.sample: reject.reason
        for position in range(len(artifact.shard_sizes))
        for reject in artifact.commit(position).rejects
    }
    assert len(artifact) == 13
    assert rejects["05.png"] == "non-finite embedding"
    assert rejects.keys() == {"03-corrupt.jpg", "05.png", "06-cut.png", "09-large.png"}


def test_inspection_and_cards_describe_clean_images(made: Merge, tmp_path: Path) -> None:
    artifact = made("none", targets="both")
    facts = dm.inspect(artifact)
    assert (facts["attack_loss"], facts["attack_loss_start"]) == (None, None)
    assert f"{GROUPS} clean images and their embeddings" in dataset_card(facts)
    shown = CliRunner().invoke(inspect, [str(tmp_path / "none")]).stdout
    assert re.search(r"attack\W+none\W", shown)
    assert "attack loss" not in shown
    assert dm.preview(artifact).format == "PNG"
    assert "embeddings" not in dataset_card(dm.inspect(made("labels", targets="label", encoder=None)))
    attacked = made("attacked", attack="pgd", steps=1, members=1)
    assert "clean images" not in dataset_card(dm.inspect(attacked))
    assert "embeddings" not in dataset_card(dm.inspect(attacked))
    with refused(ConfigError, None, tmp_path / "none", "clean images", '`attack="pgd"`'):
        dm.remerge(artifact, tmp_path / "fewer", dm.Remerge(members=1))


def test_clean_groups_can_be_converted_and_combined(made: Merge, images: Pixels, tmp_path: Path) -> None:
    artifact = made("none")
    tars = dm.convert(artifact, tmp_path / "tars", format="webdataset", encoding="float32")
    back = dm.convert(tars, tmp_path / "back", format="zarr", encoding="uint8_moments")
    assert back.manifest.layout == artifact.manifest.layout
    assert dm.diff(artifact, back).equal
    with refused(dm.UserError, None, artifact.location.url, "twice"):
        dm.combine([artifact, back], tmp_path / "twice")
    with refused(dm.UserError, None, "attack"):
        dm.combine([artifact, made("attacked", attack="pgd", steps=1, members=1)], tmp_path / "mixed")
    np.savez(tmp_path / "y.npz", images=images, labels=np.zeros(GROUPS, np.int64))
    union = dm.combine([artifact, made("other", source=str(tmp_path / "y.npz"))], tmp_path / "union")
    assert (len(union), union.manifest.provenance["attack"]) == (2 * GROUPS, None)
    assert f"{2 * GROUPS} clean images" in dataset_card(dm.inspect(union))


def test_a_dry_run_counts_one_forward_pass_per_image(photos: Path, tmp_path: Path) -> None:
    def flops(*more: str) -> Any:
        flags = ["--attack", "none", "--device", "cpu", "--dry-run", "--json", *more]
        done = CliRunner().invoke(command, [str(photos), str(tmp_path / "out"), *flags])
        return json.loads(done.stdout)["estimate"]["flops"]

    assert flops("--encoder", ENCODER) == GROUPS * 2 * (192 * 16 + 16 * 4)
    assert flops("--targets", "label") is None


@pytest.mark.parametrize(
    ("settings", "field", "facts"),
    [
        ({"members": 2}, "members", [1, 2]),
        ({"encoder": None}, "encoder", ["embeddings"]),
        ({"targets": "label"}, "encoder", []),
        ({"image_size": 8, "encoder": None, "targets": "label"}, "image_size", []),
    ],
)
def test_settings_that_do_not_go_with_clean_groups_are_refused(
    settings: dict[str, Any], field: str, facts: list[object]
) -> None:
    places = {"source": "photos", "artifact": "a", "attack": "none", "encoder": ENCODER}
    assert MergeConfig.model_validate({**places, "members": 1}).group_size == 1
    with refused(ConfigError, field, *facts):
        MergeConfig(**{**places, **settings})
