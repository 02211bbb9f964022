"""Full disks: every command names the file in a one-line error, and nothing half-written looks finished."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import datamerge.cli
from datamerge.evaluation.store import ArmFolder
from storage_schemas import ArtifactWriter, DatamergeError, Location, NotAnArtifact, open_artifact
from storage_schemas.access.atomic import atomic_file, writing
from tests.support.merging import merge_alone
from tests.support.refusals import refused
from trainer import TrainConfig, train
from trainer.run.checkpoint import RunFolder
from trainer.run.logs import RunLog

ENCODER = "mlp:3x8x8-64-4"
LIMIT = 8192  # bytes a file may have


@contextmanager
def full(limit: int = LIMIT) -> Iterator[None]:
    """Limit files to `limit` bytes inside the block; Python ignores the signal, so that writing raises an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    np.savez(folder / "photos.npz", images=images, labels=np.arange(12) % 3)
    settings = {"encoder": ENCODER, "groups_per_shard": 12, "keep_members": True, "members": 4}
    merge_alone(folder / "photos.npz", folder / "artifact", **settings)
    return folder / "artifact"


def _config(artifact: Path, run: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(artifact=str(artifact), run=str(run), encoder=ENCODER, steps=2, batch_size=4, **settings)


COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "convert": lambda artifact, out: ["convert", artifact, out, "--format", "zarr"],
    "remerge": lambda artifact, out: ["remerge", artifact, out, "--members", "2"],
    "export": lambda artifact, out: ["export", artifact, open_artifact(artifact)[0].key, "-o", out],
    "preview": lambda artifact, out: ["preview", artifact, "-o", f"{out}.png"],
    "train": lambda artifact, out: ["train", artifact, out, "--encoder", ENCODER, "--steps", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_name_the_file(
    command: str,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["datamerge", "-q", *map(str, COMMANDS[command](artifact, out))])
    monkeypatch.setenv("DATAMERGE_QUIET", "1")  # restored after the test; the command sets it too
    with pytest.raises(SystemExit) as end, full(1024):
        datamerge.cli.main()
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING")]
    assert end.value.code == 1, errors
    assert len(errors) == 1, errors
    assert str(out) in errors[0]
    assert "File too large" in errors[0]
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp" or path.name == "run.json"]
    if command in ("convert", "remerge"):
        with pytest.raises(NotAnArtifact):
            open_artifact(out)


def test_a_full_disk_at_a_checkpoint_keeps_the_previous_one(artifact: Path, tmp_path: Path) -> None:
    """The run continues once there is room."""
    train(_config(artifact, tmp_path / "whole", checkpoint_every=1))
    with refused(DatamergeError, None, tmp_path / "run/checkpoints/step-000001.pt", "File too large"), full(40_000):
        train(_config(artifact, tmp_path / "run", checkpoint_every=1))
    assert list((tmp_path / "run/checkpoints").iterdir()) == []
    folder = RunFolder(str(tmp_path / "run"))
    folder.save({"step": 1, "x": torch.zeros(10)}, 2)
    with refused(DatamergeError, None, "step-000002.pt", "step-000001.pt is kept"), full():
        folder.save({"step": 2, "x": torch.zeros(10_000)}, 2)
    assert [path.name for path in folder.checkpoints()] == ["step-000001.pt"]
    folder.checkpoints()[0].unlink()
    summary = train(_config(artifact, tmp_path / "run", checkpoint_every=1))
    assert summary.encoder_sha256 == train(_config(artifact, tmp_path / "whole", checkpoint_every=1)).encoder_sha256


def test_a_full_disk_at_a_log_is_an_error(tmp_path: Path) -> None:
    with (
        refused(DatamergeError, None, tmp_path / "log.jsonl", "File too large"),
        RunLog(tmp_path, 0, {"wandb_project": None}) as log,
        full(),
    ):
        for step in range(1000):
            log.write(step, 0, {"loss": 1.0})


def test_a_full_disk_at_a_result_leaves_no_result(tmp_path: Path) -> None:
    folder = ArmFolder(str(tmp_path), "pgd", "run", "arm")
    with refused(DatamergeError, None, folder.path / "items/x.json", "File too large"), full():
        folder.write("x", {"a": "b" * LIMIT})
    assert folder.read("x") is None


def test_a_full_disk_in_a_merge_commits_no_shard(artifact: Path, tmp_path: Path) -> None:
    made = open_artifact(artifact)
    writer = ArtifactWriter(Location(tmp_path / "a"), made.manifest.layout, made.manifest.provenance)
    writer.begin({})
    with pytest.raises(OSError, match="File too large") as caught, full():
        writer.commit(0, iter(made), ())
    assert str(tmp_path / "a") in str(caught.value.filename)
    assert not writer.committed()


@pytest.mark.parametrize(
    ("write", "fact"),
    [
        (lambda path: torch.save({"x": torch.zeros(10_000)}, path), "may be full"),
        (lambda path: save_file({"x": torch.zeros(10_000)}, path), "File too large"),
        (lambda path: path.write_bytes(bytes(40_000)), "File too large"),
    ],
    ids=["torch", "safetensors", "bytes"],
)
def test_errors_of_libraries_on_a_full_disk_are_converted(
    write: Callable[[Path], Any], fact: str, tmp_path: Path
) -> None:
    with refused(DatamergeError, None, tmp_path / "x", fact), full(), writing(tmp_path / "x"):
        write(tmp_path / "x")


def test_other_errors_are_raised_unchanged(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")
    with pytest.raises(FileNotFoundError) as caught, atomic_file(tmp_path / "x"):
        (tmp_path / "nothing").read_bytes()
    assert caught.value.filename == str(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []
