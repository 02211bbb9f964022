"""Stopped and continued runs: the groups they read, their best state, their identity, and float32 arithmetic."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.data.stream
import trainer.run.job
from storage_schemas import ConfigError
from storage_schemas.schema.pixel_length import PixelLength
from tests.support.artifacts import same_groups
from tests.support.recorder import SPEC, recording
from tests.support.refusals import refused
from trainer import Stopped, TrainConfig, train
from trainer.run.checkpoint import RunFolder
from trainer.run.distributed import Processes
from trainer.run.identity import free_of_place
from trainer.run.job import make_job
from trainer.run.loop import run_job

MakeArtifact = Callable[..., str]
GROUPS, BATCH, STEPS = 10, 4, 9
PER_EPOCH = math.ceil(GROUPS / BATCH)


def _config(artifact: str, run: Path, **settings: Any) -> TrainConfig:
    shared = {"steps": STEPS, "batch_size": BATCH, "learning_rate": 1e-2, "log_every": 1}
    return TrainConfig(artifact=artifact, run=str(run), **{**shared, **settings})


def _train_and_record(config: TrainConfig, act: Callable[[], Any] | None = None, at: int = -1) -> list[list[str]]:
    """Train; return the keys of the micro-batches that were read. `act` is called before the one at position `at`."""
    original = trainer.data.stream.stream
    seen: list[list[str]] = []

    def stream(*arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in original(*arguments, **options):
            if options["stop"] == config.steps:  # else it is one of the held-out groups
                if len(seen) == at and act is not None:
                    act()
                seen.append(batch.keys)
            yield batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.run.job, "stream", stream)
        with pytest.raises((Stopped, MemoryError)) if act is not None else contextlib.nullcontext():
            train(config)
    return seen


def _stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def _crash() -> None:
    raise MemoryError


ARMS: list[dict[str, Any]] = [
    {"arm": "random-member"},
    {"arm": "ind", "accumulate": 2},
    {"arm": "factors", "data_workers": 1},
]


@pytest.mark.parametrize("settings", ARMS, ids=str)
def test_no_group_is_repeated_or_left_out(
    make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Stopped inside the first epoch, continued to the end of the second, and then to the end."""
    artifact, pieces = make_artifact(factors=2), settings.get("accumulate", 1)
    whole = _train_and_record(_config(artifact, tmp_path / "whole", **settings))
    epochs = [Counter(key for keys in whole[i : i + PER_EPOCH * pieces] for key in keys) for i in (0, 3 * pieces)]
    assert epochs == [Counter(f"k{number}" for number in range(GROUPS))] * 2
    assert len(whole) == STEPS * pieces

    config = _config(artifact, tmp_path / "stopped", **settings)
    recorded: list[list[str]] = []
    for stop in (2, 2 * PER_EPOCH):  # steps since the start of the run
        recorded += _train_and_record(config, _stop, at=(stop - 1) * pieces - len(recorded))
        assert len(recorded) == stop * pieces
    assert recorded + _train_and_record(config) == whole


@pytest.mark.parametrize("arm", ["random-member", "factors"])
def test_after_a_crash_reading_continues_at_the_checkpoint(
    make_artifact: MakeArtifact, tmp_path: Path, arm: str
) -> None:
    artifact = make_artifact(factors=2)
    whole = _train_and_record(_config(artifact, tmp_path / "whole", arm=arm))
    config = _config(artifact, tmp_path / "killed", arm=arm, checkpoint_every=2)
    assert _train_and_record(config, _crash, 5) == whole[:5]
    assert _train_and_record(config) == whole[4:]


def _evaluated(config: TrainConfig) -> dict[int, float]:
    lines = [json.loads(line) for line in (Path(config.run) / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def _best(config: TrainConfig) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(Path(config.run) / "checkpoints/best.pt", weights_only=True)
    return state


def test_other_held_out_groups_restart_the_search_for_the_best_state(
    make_artifact: MakeArtifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = make_artifact()
    # Losses of `hard` are far above those of `easy`: compared with these, no state would ever be the best again.
    easy, hard = same_groups(artifact), make_artifact(name="hard", seed=11, scale=30.0)
    config = _config(artifact, tmp_path / "run").model_copy(update={"eval_every": 1})
    _train_and_record(config.model_copy(update={"eval_artifact": easy}), _stop, 3)
    before = _best(config)
    _train_and_record(config.model_copy(update={"eval_artifact": hard}), _stop, 2)
    assert "the search for the best state starts again" in capsys.readouterr().err
    found, losses = _best(config), _evaluated(config)
    assert before["step"] <= 4 < found["step"]
    assert found["best"] == min(loss for step, loss in losses.items() if step > 4)
    assert found["best"] > before["best"]
    # Continuing without held-out groups keeps the best state, continuing with them goes on with the search.
    _train_and_record(config, _stop, 0)
    train(config.model_copy(update={"eval_artifact": hard}))
    assert "search for the best state" not in capsys.readouterr().err
    assert _best(config)["best"] == min(loss for step, loss in _evaluated(config).items() if step > 4)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("settings", [{"arm": "avg"}, {"arm": "ind", "refine_steps": 1}], ids=str)
def test_precision_settings_hold_in_every_pass(
    make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any], precision: str
) -> None:
    attack = {"epsilon": "8/255", "step_size": "1/255", "steps": 10}
    with recording() as notes:
        artifact = make_artifact(clean=True, attack=attack)
        settings = {**settings, "encoder": SPEC, "precision": precision, "eval_artifact": same_groups(artifact)}
        config = _config(artifact, tmp_path / "run", steps=2, **settings)
        job = make_job(config)
        notes.clear()  # drop the passes that checked the shape and that rows do not mix
        run_job(job, RunFolder(config.run), Processes())
        assert {found.backward for found in notes} == {False, True}
        assert all(found.deterministic and found.products == "highest" for found in notes)
        assert {found.tf32 for found in notes} == {precision != "float32"}
        assert (torch.bfloat16 in {found.dtype for found in notes}) == (precision == "bfloat16")


def test_only_a_finished_run_of_an_earlier_release_is_accepted(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    """Its identity.json has the spellings of that release; an unfinished run cannot be continued in another order."""
    artifact = make_artifact(clean=True, attack={"epsilon": "8/255", "step_size": "1/255", "steps": 10})
    settings: dict[str, Any] = {"arm": "ind", "refine_steps": 1, "epsilon": "8/255", "refine_step_size": "0.25"}
    config = _config(artifact, tmp_path / "run", **settings, precision="bfloat16")
    _train_and_record(config, _stop, 4)
    present = (tmp_path / "run/identity.json").read_text()
    # Arms without estimators had one too.
    earlier = {"precision": "bf16", "epsilon": "8 / 255", "refine_step_size": "0.25", "estimator": "antithetic"}
    identity = {**json.loads(present), **earlier}
    # It did not record the preprocessing.
    assert identity.pop("preprocessing")["mean"] == [0.5]
    assert [identity.pop(name) for name in ("order", "shuffle_window")] == [2, 2**18]
    (tmp_path / "run/identity.json").write_text(json.dumps(identity))
    with refused(ConfigError, "run", config.run, "datamerge 0.1", "another order"):
        train(config)
    (tmp_path / "run/identity.json").write_text(present)
    summary = train(config)
    (tmp_path / "run/identity.json").write_text(json.dumps(identity))
    assert train(config) == train(config.model_copy(update={"shuffle_window": 8})) == summary
    with refused(ConfigError, "run", config.run, "(refine_step_size: '1/4' there, '1/8' now)"):
        train(config.model_copy(update={"refine_step_size": PixelLength("1/8")}))


def test_settings_of_ray_are_no_part_of_a_runs_identity(make_artifact: MakeArtifact, tmp_path: Path) -> None:
    config = _config(make_artifact(), tmp_path / "run")
    train(config)
    identity = json.loads((tmp_path / "run/identity.json").read_text())
    assert not {name for name in identity if name.startswith("ray")}
    assert free_of_place(config) == free_of_place(config.model_copy(update={"ray_workers": 2, "ray_address": "auto"}))


@pytest.mark.parametrize(("settings", "again"), [({"arm": "ind"}, False), ({"arm": "avg"}, True)], ids=str)
def test_a_best_state_measured_by_another_loss_is_dropped(
    make_artifact: MakeArtifact, tmp_path: Path, settings: dict[str, Any], again: bool
) -> None:
    """Earlier releases measured some arms by another loss than the trained one; their `best_of` is a hash alone."""
    artifact = make_artifact()
    config = _config(artifact, tmp_path / "run", eval_artifact=same_groups(artifact), eval_every=1, **settings)
    _train_and_record(config, _stop, 4)
    checkpoint = tmp_path / "run/checkpoints/step-000005.pt"
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "best": 1e-9, "best_of": state["best_of"].split(",")[0]}, checkpoint)
    train(config)
    assert (_best(config)["step"] > 5) == again
