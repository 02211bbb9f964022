"""Several artifacts in one run: one order over all of them, weights, and refusals of incompatible artifacts."""

from __future__ import annotations

import json
import pickle
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import trainer.data.stream
import trainer.run.job
from storage_schemas import (
    ArraySpec,
    ArtifactWriter,
    ConfigError,
    CorruptShard,
    Layout,
    Location,
    Record,
    open_artifact,
)
from tests.support.artifacts import same_groups
from tests.support.refusals import refused
from tests.support.training_artifacts import ENCODER, GROUPS, SHAPE, WIDTH
from trainer import NotFiniteRun, Stopped, TrainConfig, train
from trainer.cli import train as command
from trainer.data.batches import MomentBatch
from trainer.data.blend import Blend
from trainer.data.order import Order, Partition
from trainer.data.stream import Collate, stream
from trainer.run.job import make_job

MakeArtifact = Callable[..., str]
BATCH = 4


@pytest.fixture
def two(make_artifact: MakeArtifact) -> list[str]:
    return [make_artifact(name="tars"), make_artifact(name="arrays", format="zarr", seed=11)]


def _config(artifact: str | list[str], run: Path, **settings: Any) -> TrainConfig:
    shared: dict[str, Any] = {"epochs": 2, "batch_size": BATCH, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(artifact=artifact, run=str(run), **{**shared, **settings})


def _keys(artifact: str, times: int = 1) -> Counter[str]:
    return Counter({f"k{number} of {artifact}": times for number in range(GROUPS)})


def _train_and_record(config: TrainConfig, stop_at: int = -1) -> list[list[str]]:
    """Train; return the keys of the micro-batches that were read. A signal comes before the one at `stop_at`."""
    original = trainer.data.stream.stream
    seen: list[list[str]] = []

    def watched(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in original(*arguments, **options):
            if len(seen) == stop_at:
                signal.raise_signal(signal.SIGTERM)
            seen.append(batch.keys)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.run.job, "stream", watched)
        if stop_at < 0:
            train(config)
        else:
            with pytest.raises(Stopped):
                train(config)
    return seen


def test_every_group_of_all_artifacts_occurs_once_per_epoch(two: list[str], tmp_path: Path) -> None:
    whole = _train_and_record(_config(two, tmp_path / "whole"))
    for epoch in (whole[:5], whole[5:]):
        assert Counter(key for keys in epoch for key in keys) == _keys(two[0]) + _keys(two[1])
    # The order is that of both artifacts, one after the other.
    records = [f"{record.key} of {url}" for url in two for record in open_artifact(url)]
    sizes = [size for url in two for size in open_artifact(url).shard_sizes]
    order = Order(sizes, BATCH, 0)
    assert whole == [[records[index] for index in order.batch(step)] for step in range(10)]


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2}], ids=str)
def test_a_continued_run_reads_the_remaining_groups(two: list[str], tmp_path: Path, settings: dict[str, Any]) -> None:
    texts = [two[0], f"{two[1]}=1.5"]
    whole = _train_and_record(_config(texts, tmp_path / "whole", epochs=1))
    assert sum(map(len, whole)) == 2.5 * GROUPS
    first = _train_and_record(_config(texts, tmp_path / "stopped", epochs=1), 2)
    last = _train_and_record(_config(texts, tmp_path / "stopped", epochs=1, **settings))
    assert [key for keys in first + last for key in keys] == [key for keys in whole for key in keys]


@pytest.mark.parametrize(("weight", "least", "most", "taken"), [(0.4, 0, 1, 4), (2.0, 2, 2, 20), (1.25, 1, 2, 13)])
def test_weights_determine_how_often_groups_occur(
    two: list[str], tmp_path: Path, weight: float, least: int, most: int, taken: int
) -> None:
    """1.25 times ten groups are 12.5, which is rounded up."""
    recorded = _train_and_record(_config([f"{two[0]}={weight}", two[1]], tmp_path / "run", batch_size=5))
    flat = [key for keys in recorded for key in keys]
    epochs = [Counter(flat[: len(flat) // 2]), Counter(flat[len(flat) // 2 :])]
    for times in epochs:
        assert {key: times[key] for key in _keys(two[1])} == _keys(two[1])
        counts = [times[key] for key in _keys(two[0])]
        assert sum(counts) == taken
        assert least <= min(counts) <= max(counts) <= most
    assert (epochs[0] == epochs[1]) == (weight == 2)
    summary = json.loads((tmp_path / "run/run.json").read_text())
    assert summary["groups"] == 2 * (taken + GROUPS)
    assert [(one["url"], one["weight"], one["groups"]) for one in summary["artifacts"]] == [
        (two[0], weight, GROUPS),
        (two[1], 1, GROUPS),
    ]
    assert [one["plan_sha256"] for one in summary["artifacts"]] == [
        open_artifact(url).manifest.plan_sha256 for url in two
    ]


def test_a_list_of_one_artifact_is_recorded_as_that_artifact(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    summary = train(_config([artifact], tmp_path / "run", epochs=1))
    plan = open_artifact(artifact).manifest.plan_sha256
    assert (summary.artifact, summary.plan_sha256, summary.config["artifact"]) == (artifact, plan, artifact)
    assert json.loads((tmp_path / "run/identity.json").read_text())["plan_sha256"] == plan


def test_a_run_belongs_to_its_artifacts_and_weights(
    two: list[str], make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    config = _config(two, tmp_path / "run", epochs=None, steps=2)
    summary = train(config)
    assert train(config) == summary
    others: list[str | list[str]] = [
        two[::-1],
        [two[0], f"{two[1]}=0.5"],
        two[0],
        [*two, make_artifact(name="third", seed=12)],
    ]
    for other in others:
        with refused(ConfigError, "run", config.run, "plan_sha256"):
            train(_config(other, tmp_path / "run", epochs=None, steps=2))


def test_a_blend_can_be_pickled(two: list[str]) -> None:
    blend = Blend([open_artifact(url) for url in two])
    sent: Blend = pickle.loads(pickle.dumps(blend.only({"sum", "scatter", "target"})))
    assert len(sent) == 2 * GROUPS
    assert [sent[index].key for index in (0, GROUPS)] == [f"k0 of {url}" for url in two]
    assert {*sent[GROUPS].arrays} == {"sum", "scatter", "target"}
    assert sent.where(GROUPS + 1).startswith(two[1])
    with pytest.raises(IndexError):
        sent[2 * GROUPS]


def test_encodings_of_artifacts_may_differ(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    exact = make_artifact()
    arrays = [ArraySpec(name=name, dtype="float32", shape=SHAPE) for name in ("mean", "mean_square")]
    arrays.append(ArraySpec(name="target", dtype="float32", shape=(WIDTH,)))
    layout = Layout(format="zarr", encoding="float32", arrays=tuple(arrays), groups=2, groups_per_shard=2)
    writer = ArtifactWriter(Location(tmp_path / "float"), layout, open_artifact(exact).manifest.provenance)
    writer.begin({})
    rng = np.random.default_rng(0)
    written = []
    for key in ("a", "b"):
        mean = rng.random(SHAPE, np.float32)
        target = rng.random(WIDTH, np.float32)
        written.append(
            Record(
                key=key,
                count=2,
                encoding="float32",
                arrays={"mean": mean, "mean_square": mean**2 + np.float32(0.01), "target": target},
            )
        )
    writer.commit(0, written, [])
    writer.finish()
    both = [exact, str(tmp_path / "float")]
    assert train(_config(both, tmp_path / "run")).groups == 2 * (GROUPS + 2)
    blend = Blend([open_artifact(url) for url in both])
    collate = Collate(arm="avg", labels=False, members=0)
    order = Order(blend.shard_sizes, GROUPS + 2, 0)
    (sent,) = stream(blend, order, collate, start=0, stop=1, workers=0, pin=False, partition=Partition())
    batch = sent.floats()
    assert isinstance(batch, MomentBatch)
    for index, mean, variance in zip(order.batch(0), batch.mean, batch.variance, strict=True):
        assert np.array_equal(mean, blend[index].mean)
        assert np.allclose(variance, blend[index].variance, atol=1e-7)


DIFFERENCES: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"shape": (1, 5, 5), "encoder": "mlp:1x5x5-8-6"}, {}, ("pixels", "(1, 4, 4)", "(1, 5, 5)")),
    ({"width": 5}, {}, ("targets", "(6,)", "(5,)")),
    ({"sha256": "0" * 64}, {}, ("encoder", ENCODER, "0" * 12)),
    ({"attack": {"epsilon": "4/255"}}, {}, ("epsilon", "2/255", "4/255")),
    ({"targets": False, "labels": True}, {}, ("target",)),
    ({"members": False}, {"arm": "ind"}, ("members",)),
]


@pytest.mark.parametrize(("options", "settings", "facts"), DIFFERENCES, ids=lambda value: str(value)[:40])
def test_incompatible_artifacts_are_refused_with_both_values(
    make_artifact: MakeArtifact,
    tmp_path: Path,
    options: dict[str, Any],
    settings: dict[str, Any],
    facts: tuple[str, ...],
) -> None:
    shared = {"attack": {"epsilon": "2/255"}, "labels": True}
    one = make_artifact(name="one", **shared)
    other = make_artifact(name="other", seed=11, **{**shared, **options})
    field = {"ind": "arm"}.get(settings.get("arm", ""), "artifact")
    places = (other,) if field == "arm" else (one, other)
    with refused(ConfigError, field, *facts, *places):
        make_job(_config([one, other], tmp_path / "run", **settings))
    assert not (tmp_path / "run").exists()


def test_an_artifact_named_twice_is_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    with refused(ConfigError, "artifact", f"{artifact}=2"):
        make_job(_config([artifact, artifact], tmp_path / "run"))


def test_a_weight_that_takes_nothing_is_refused(two: list[str], tmp_path: Path) -> None:
    with refused(ConfigError, "artifact", f"of {GROUPS}", "0.01", two[1]):
        make_job(_config([two[0], f"{two[1]}=0.01"], tmp_path / "run"))


def test_training_artifacts_are_refused_as_held_out(
    two: list[str], make_artifact: MakeArtifact, tmp_path: Path
) -> None:
    for url_of_one in two:
        with refused(ConfigError, "eval_artifact", url_of_one):
            make_job(_config(two, tmp_path / "run", eval_artifact=url_of_one))
    make_job(_config(two, tmp_path / "run", eval_artifact=same_groups(two[0])))


def test_a_damaged_record_names_its_artifact(two: list[str], tmp_path: Path) -> None:
    shard = next(Path(two[0], "shards").iterdir())
    data = bytearray(shard.read_bytes())
    for at in range(0, len(data), 512):
        data[at : at + 256] = bytes(256)
    shard.write_bytes(data)
    with pytest.raises(CorruptShard, match=two[0]):
        train(_config(two, tmp_path / "run"))


def test_a_loss_that_is_not_finite_names_the_artifact(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    both = [make_artifact(name="one"), make_artifact(name="other", seed=11, huge="k3")]
    with pytest.raises(NotFiniteRun, match=f"k3 of {both[1]}"):
        train(_config(both, tmp_path / "run"))


def test_the_command_takes_several_artifacts(two: list[str], tmp_path: Path) -> None:
    shared = ["--batch-size", "4", "--steps", "1", "--device", "cpu"]
    run = str(tmp_path / "run")
    done = CliRunner().invoke(command, [*two, run, "--json", *shared])
    assert done.exit_code == 0, done.output
    assert [one["url"] for one in json.loads(done.stdout)["artifacts"]] == two
    file = tmp_path / "train.toml"
    file.write_text(f"artifact = {json.dumps([two[0], two[1] + '=0.5'])}\nrun = '{tmp_path / 'other'}'\n")
    done = CliRunner().invoke(command, ["--config", str(file), "--json", *shared])
    assert [one["weight"] for one in json.loads(done.stdout)["artifacts"]] == [1, 0.5]
