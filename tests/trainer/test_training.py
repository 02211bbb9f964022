"""Whole runs: they learn, continue to the same bits, and stop on errors."""

from __future__ import annotations

import json
import re
import signal
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import trainer.data.stream
import trainer.run.job
from datamerge.encoders import Encoder, Head, load_encoder, weights_sha256
from datamerge.encoders.runs import ResolvedEncoder, resolve
from storage_schemas import ConfigError, CorruptShard, DatamergeError, open_artifact
from tests.support.exact import exact
from tests.support.refusals import refused
from trainer import RunSummary, SquaredError, Stopped, TrainConfig, train
from trainer.data.order import Order
from trainer.errors import NotFiniteRun
from trainer.run.update import learning_rate

MakeArtifact = Callable[..., str]
STEPS = 9


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    defaults = {"steps": STEPS, "batch_size": 4, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(artifact=artifact, run=str(run), **{**defaults, **settings})


def _log(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def _losses(run: Path) -> list[tuple[float | None, ...]]:
    return [(line["step"], line["loss"], line.get("correction"), line["gradient_norm"]) for line in _log(run)]


def _weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "encoder.safetensors")


def _assert_same_result(one: Path, other: Path) -> None:
    assert _losses(one) == _losses(other)
    for name, tensor in _weights(one).items():
        assert torch.equal(tensor, _weights(other)[name]), name


class _Dropout(nn.Module):
    """A network with everything that makes resuming hard: dropout, and BatchNorm's running statistics."""

    input_shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 6)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)  # type: ignore[no-any-return]


@pytest.fixture
def dropout_spec(monkeypatch: pytest.MonkeyPatch) -> str:
    module = types.ModuleType("toy_networks")
    module.__dict__["dropout"] = _Dropout
    monkeypatch.setitem(sys.modules, "toy_networks", module)
    return "python:toy_networks:dropout"


def _interrupt(monkeypatch: pytest.MonkeyPatch, after: int, act: Callable[[], None]) -> None:
    """Call `act` when the batch after the first `after` steps of the next training is requested."""
    original = trainer.data.stream.stream

    def stream(*args: Any, **options: Any) -> Iterator[Any]:
        for number, batch in enumerate(original(*args, **options)):
            if number == after:
                act()
            yield batch

    monkeypatch.setattr(trainer.run.job, "stream", stream)


def _crash() -> None:
    raise MemoryError("the machine died")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("stop", [0, 1, 4, 7])
def test_a_stopped_run_continues_to_the_same_bits(
    make_artifact: MakeArtifact, tmp_path: Path, stop: int, number: signal.Signals, dropout_spec: str
) -> None:
    artifact = make_artifact()
    train(_config(artifact, tmp_path / "whole", encoder=dropout_spec))
    config = _config(artifact, tmp_path / "stopped", encoder=dropout_spec)
    before = signal.getsignal(signal.SIGINT)  # not the default one where the tests themselves run in the background
    with pytest.MonkeyPatch.context() as patch:
        _interrupt(patch, stop, lambda: signal.raise_signal(number))
        with refused(Stopped, None, f"step {stop + 1} of {STEPS}", f"step-{stop + 1:06}.pt") as stopped:
            train(config)
    assert isinstance(stopped.value, Stopped)
    assert stopped.value.signal == number
    assert signal.getsignal(signal.SIGINT) is before
    summary = train(config)
    assert summary.steps == STEPS
    _assert_same_result(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("arm", ["avg", "ind", "mean-only"])
def test_a_killed_run_repeats_only_the_steps_since_its_checkpoint(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    artifact = make_artifact()
    train(_config(artifact, tmp_path / "whole", arm=arm))
    config = _config(artifact, tmp_path / "killed", arm=arm, checkpoint_every=2, keep_checkpoints=2)
    with monkeypatch.context() as patch:
        _interrupt(patch, 7, _crash)
        with pytest.raises(MemoryError):
            train(config)
    with (tmp_path / "killed/log.jsonl").open("a") as stream:
        stream.write('{"step": 8, "lo')  # torn by the crash
    names = [path.name for path in sorted((tmp_path / "killed/checkpoints").iterdir())]
    assert names == ["step-000004.pt", "step-000006.pt"]
    given: list[int] = []
    with monkeypatch.context() as patch:
        original = trainer.data.stream.stream

        def counted(*args: Any, **options: Any) -> Iterator[Any]:
            for batch in original(*args, **options):
                given.append(len(batch.keys))
                yield batch

        patch.setattr(trainer.run.job, "stream", counted)
        train(config)
    assert len(given) == config.steps - 6  # type: ignore[operator]  # it is set
    _assert_same_result(tmp_path / "whole", tmp_path / "killed")


def test_a_damaged_checkpoint_is_named(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(make_artifact(), tmp_path / "run", checkpoint_every=2)
    with monkeypatch.context() as patch:
        _interrupt(patch, 5, _crash)
        with pytest.raises(MemoryError):
            train(config)
    newest = tmp_path / "run/checkpoints/step-000004.pt"
    newest.write_bytes(newest.read_bytes()[:100])
    with refused(DatamergeError, None, newest):
        train(config)
    newest.unlink()
    assert train(config).steps == STEPS


def test_a_finished_run_is_left_alone(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    config = _config(make_artifact(), tmp_path / "run")
    summary = train(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    # Checkpoints and threads may change; it is the same run.
    assert train(config.model_copy(update={"checkpoint_every": 3, "threads": None})) == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_the_summary_records_what_evaluation_reads(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    summary = train(_config(artifact, tmp_path / "run", steps=None, epochs=2))
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert RunSummary.model_validate(document) == summary
    assert document["original"] == "mlp:1x4x4-8-6"
    assert document["encoder"] == f"mlp:1x4x4-8-6@{tmp_path / 'run/encoder.safetensors'}"
    assert load_encoder(document["encoder"]).sha256 == document["encoder_sha256"]
    assert document["encoder_sha256"] != document["original_sha256"] == load_encoder("mlp:1x4x4-8-6").sha256
    assert (document["steps"], document["groups"]) == (6, 20)
    arrays = open_artifact(artifact).manifest.layout.arrays
    assert document["bytes"] == 20 * sum(spec.nbytes for spec in arrays if spec.name in ("sum", "scatter", "target"))
    assert document["artifact"] == artifact
    assert summary.preprocessing == load_encoder("mlp:1x4x4-8-6").preprocessing
    assert document["config"]["loss"] == "squared_error"
    assert document["config"]["device"] != "auto"


def test_a_run_can_start_from_the_weights_of_another(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    first = train(_config(artifact, tmp_path / "first"))
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    second = train(_config(artifact, tmp_path / "second", encoder=str(moved)))
    assert second.original == f"mlp:1x4x4-8-6@{moved}/encoder.safetensors"
    assert second.original_sha256 == first.encoder_sha256
    assert second.preprocessing == first.preprocessing
    assert train(_config(artifact, tmp_path / "second", encoder=str(moved))) == second
    (moved / "encoder.safetensors").write_bytes((tmp_path / "second/encoder.safetensors").read_bytes())
    with refused(ConfigError, "encoder", moved, first.encoder_sha256[:12], second.encoder_sha256[:12]):
        train(_config(artifact, tmp_path / "third", encoder=str(moved)))


def test_formats_and_data_workers_do_not_change_a_run(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    tar, zarr = make_artifact(name="tar"), make_artifact(name="zarr", format="zarr")
    train(_config(tar, tmp_path / "a"))
    train(_config(zarr, tmp_path / "b"))
    train(_config(tar, tmp_path / "c", data_workers=1))
    _assert_same_result(tmp_path / "a", tmp_path / "b")
    _assert_same_result(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("members", [1, 2, None])
def test_ind_is_the_ordinary_loss_of_the_first_members(
    make_artifact: MakeArtifact, tmp_path: Path, members: int | None
) -> None:
    path = make_artifact()
    config = _config(path, tmp_path / "run", arm="ind", members=members, warmup_steps=2)
    train(config)

    artifact, encoder = open_artifact(path), load_encoder("mlp:1x4x4-8-6")
    optimizer = torch.optim.AdamW(encoder.parameters(), weight_decay=1e-4)
    order, losses = Order(artifact.shard_sizes, 4, 0), []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = learning_rate(config, step, STEPS)
        groups = []
        for record in (artifact[int(index)] for index in order.batch(step)):
            assert record.members is not None
            assert record.target is not None
            images = torch.from_numpy(record.members[:members]).float() / 255
            groups.append(
                torch.stack([((encoder(x[None]) - torch.from_numpy(record.target)) ** 2).sum() for x in images])
            )
        loss = torch.stack([group.mean() for group in groups]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert [line["loss"] for line in _log(tmp_path / "run")] == pytest.approx(losses, rel=1e-5)


def test_avg_learns(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    train(_config(make_artifact(), tmp_path / "run", steps=150, batch_size=10))
    losses = [line["loss"] for line in _log(tmp_path / "run")]
    assert np.mean(losses[-10:]) < 0.6 * np.mean(losses[:10])
    assert all(line["correction"] > 0 for line in _log(tmp_path / "run"))
    assert {"learning_rate", "groups_per_second", "data_wait", "epoch", "correction_share"} <= _log(tmp_path / "run")[
        0
    ].keys()
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_many_pseudo_labels_average_to_the_exact_correction(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    train(_config(artifact, tmp_path / "many", samples=200, learning_rate=1e-9))
    stored, encoder = list(open_artifact(artifact)), load_encoder("mlp:1x4x4-8-6")
    mean, variance = (torch.from_numpy(np.stack([getattr(r, name) for r in stored])) for name in ("mean", "variance"))
    correction = exact(encoder, mean, variance, torch.zeros(len(stored), 6), SquaredError()).correction
    assert correction is not None
    many = np.mean([line["correction"] for line in _log(tmp_path / "many")])
    assert many == pytest.approx(float(correction.detach().mean()), rel=0.1)


def test_cross_entropy_through_the_frozen_head_of_the_artifact(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    head = Head(torch.eye(6) * 2, torch.zeros(6), names=list("abcdef"))
    artifact = make_artifact(targets=False, labels=True, head=head.to_bytes())
    summary = train(_config(artifact, tmp_path / "run", steps=60, batch_size=10))
    losses = [line["loss"] for line in _log(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert (summary.config["loss"], summary.config["head"]) == ("cross_entropy", "artifact")
    assert set(_weights(tmp_path / "run")) == set(load_encoder("mlp:1x4x4-8-6").model.state_dict())
    (tmp_path / "head.safetensors").write_bytes(head.to_bytes())
    train(_config(artifact, tmp_path / "given", steps=60, batch_size=10, head=str(tmp_path / "head.safetensors")))
    _assert_same_result(tmp_path / "run", tmp_path / "given")


def test_cross_entropy_without_head_trains_the_encoders_outputs(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    summary = train(_config(make_artifact(targets=False, labels=True), tmp_path / "run"))
    assert summary.config["head"] is None


def test_batch_norm_statistics_do_not_change(make_artifact: MakeArtifact, tmp_path: Path, dropout_spec: str) -> None:
    train(_config(make_artifact(), tmp_path / "run", encoder=dropout_spec, batch_size=1))
    weights = _weights(tmp_path / "run")
    assert not weights["layers.2.running_mean"].any()
    assert torch.equal(weights["layers.2.running_var"], torch.ones(8))
    assert not torch.equal(weights["layers.2.weight"], torch.ones(8))


@pytest.mark.parametrize("arm", ["avg", "ind"])
def test_a_loss_that_is_not_finite_names_the_record_and_changes_nothing(
    make_artifact: MakeArtifact, tmp_path: Path, arm: str
) -> None:
    config = _config(make_artifact(huge="k6"), tmp_path / "run", checkpoint_every=1, arm=arm)
    with refused(NotFiniteRun, None, "step ", "loss", "inf", "k6;"):
        train(config)
    assert all(np.isfinite(line["loss"]) for line in _log(tmp_path / "run"))
    assert not (tmp_path / "run/run.json").exists()


def test_a_gradient_that_is_not_finite_stops_the_run(
    make_artifact: MakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders: list[Encoder] = []

    def load(spec: str, device: str, image_size: int | None) -> ResolvedEncoder:
        found = resolve(spec, device=device, image_size=image_size)
        encoders.append(found.encoder)
        return found

    monkeypatch.setattr(trainer.run.job, "resolve", load)
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    with refused(NotFiniteRun, None, "step 1", "gradient norm", "nan") as error:
        train(_config(make_artifact(), tmp_path / "run"))
    assert re.search(r"k\d, k\d, k\d, k\d;", str(error.value))
    assert weights_sha256(encoders[0].model) == encoders[0].sha256


def test_a_damaged_shard_is_reported_from_a_data_worker(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    shard = Path(artifact) / "shards/00001.tar"
    data = bytearray(shard.read_bytes())
    entry = open_artifact(artifact).commit(1).records[2]
    assert entry.offsets is not None
    data[entry.offsets["sum"]] ^= 1
    shard.write_bytes(data)
    with refused(CorruptShard, None, "k6"):
        train(_config(artifact, tmp_path / "run", steps=4, data_workers=1))


def test_the_learning_rate_warms_up_and_decays(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    config = _config(make_artifact(), tmp_path / "run", warmup_steps=3, learning_rate=1.0)
    rates = [learning_rate(config, step, STEPS) for step in range(STEPS + 1)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert rates[STEPS] == pytest.approx(0)


def test_global_random_state_is_left_alone(make_artifact: MakeArtifact, tmp_path: Path, dropout_spec: str) -> None:
    artifact = make_artifact()
    load_encoder(dropout_spec)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(_config(artifact, tmp_path / "run", encoder=dropout_spec))
    assert torch.equal(torch.get_rng_state(), before)


def test_another_artifact_or_other_settings_are_refused(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    artifact = make_artifact()
    train(_config(artifact, tmp_path / "run"))
    with refused(ConfigError, "run", tmp_path / "run", "learning_rate: 0.01 there, 0.1 now", "seed: 0 there, 1 now"):
        train(_config(artifact, tmp_path / "run", learning_rate=0.1, seed=1))
    with refused(ConfigError, "run", tmp_path / "run", "plan_sha256"):
        train(_config(make_artifact(name="other", members=False), tmp_path / "run"))


def test_the_number_of_torch_threads_is_restored(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    train(_config(make_artifact(), tmp_path / "run", steps=1, threads=before + 1))
    assert torch.get_num_threads() == before
