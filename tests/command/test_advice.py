"""Advice in error messages is followed once; then the same command, or the advised one, works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamerge.artifacts import convert, verify
from datamerge.encoders.classes import Classes, match_classes
from datamerge.evaluation.results import ArmResult, Score
from datamerge.evaluation.tables import print_rows, table_rows
from storage_schemas import ConfigError, DatamergeError, Location, NotAnArtifact
from storage_schemas.operations.shards import write_shards
from storage_schemas.schema.run import read_summary
from storage_schemas.writer import ArtifactWriter
from tests.support.artifacts import build_layout, build_shards, write
from tests.support.command import run_command
from tests.support.refusals import refused
from trainer import TrainConfig, train


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact written by `convert`, so that the command that made it can be run again."""
    write(tmp_path / "original", build_layout("zarr"))
    convert(tmp_path / "original", tmp_path / "a", format="webdataset")
    return tmp_path / "a"


def _again(artifact: Path) -> None:
    convert(artifact.parent / "original", artifact, format="webdataset")


def _stray(artifact: Path) -> None:
    (artifact / "notes.txt").write_text("mine")


def _lose_card(artifact: Path) -> None:
    (artifact / "README.md").unlink()


def _cut_shard(artifact: Path) -> None:
    shard = artifact / "shards" / "00001.tar"
    shard.write_bytes(shard.read_bytes()[:-2048])


def _lose_sidecar(artifact: Path) -> None:
    (artifact / "commits" / "00000.json").unlink()


def _spoil_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").write_text("{")


@pytest.mark.parametrize("harm", [_stray, _lose_card, _cut_shard, _lose_sidecar, _spoil_manifest])
def test_following_the_advice_of_verify_makes_an_artifact_sound(artifact: Path, harm: Callable[[Path], None]) -> None:
    harm(artifact)
    advice = run_command("verify", artifact).stdout.splitlines()[-1]
    assert ("--fix" in advice) == (harm is not _stray)
    assert ("out of its folder" in advice) == (harm is _stray)
    if harm is _stray:
        fixed = run_command("verify", artifact, "--fix").stdout
        assert "again" not in fixed
        assert (artifact / "notes.txt").read_text() == "mine"
        (artifact / "notes.txt").rename(artifact.parent / "notes.txt")
    else:
        fixed = run_command("verify", artifact, "--fix").stdout.splitlines()[-1]
        assert "run the command that made the artifact again" in fixed
        _again(artifact)
    assert run_command("verify", artifact).returncode == 0


def test_a_finished_artifact_is_not_written_again(artifact: Path) -> None:
    """It may be on a read-only disk."""
    before = {path: path.stat().st_mtime_ns for path in artifact.rglob("*") if path.is_file()}
    _again(artifact)
    assert {path: path.stat().st_mtime_ns for path in artifact.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".png", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP"), ("", "PNG")]
)
def test_a_preview_has_the_format_of_its_suffix(artifact: Path, tmp_path: Path, suffix: str, kind: str) -> None:
    file = tmp_path / f"sheet{suffix}"
    assert run_command("preview", artifact, "-o", file).returncode == 0
    with Image.open(file) as picture:
        assert picture.format == kind


def test_a_preview_with_another_suffix_is_refused(artifact: Path, tmp_path: Path) -> None:
    done = run_command("preview", artifact, "-o", tmp_path / "sheet.tiff")
    assert (done.returncode, (tmp_path / "sheet.tiff").exists()) == (2, False)
    (advised, *_) = re.findall(r"\.\w+(?=,)", done.stderr.partition("ends in")[2])
    assert run_command("preview", artifact, "-o", tmp_path / f"sheet{advised}").returncode == 0
    key = build_shards(build_layout())[0][0].key
    assert run_command("preview", artifact, "-o", tmp_path / "k.png", "--key", key, "--groups", "2").returncode == 2
    assert run_command("preview", artifact, "-o", tmp_path / "k.png", "--key", key).returncode == 0


def test_columns_that_a_source_does_not_have_are_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "photos" / "a.png")
    done = run_command("inspect", "--source", tmp_path / "photos", "--image-column", "image")
    assert done.returncode == 2
    assert "drop --image-column" in done.stderr
    assert run_command("inspect", "--source", tmp_path / "photos").returncode == 0
    np.savez(tmp_path / "two.npz", a=np.zeros((2, 4, 4, 3), np.uint8), b=np.zeros((2, 4, 4, 3), np.uint8))
    assert "name it with --image-column" in run_command("inspect", "--source", tmp_path / "two.npz").stderr
    assert run_command("inspect", "--source", tmp_path / "two.npz", "--image-column", "b").returncode == 0
    done = run_command("inspect", "--source", tmp_path / "two.npz", "--image-column", "c")
    assert "name it with" not in done.stderr


def test_raw_images_in_place_of_an_artifact_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    done = run_command("inspect", tmp_path)
    assert done.returncode == 2
    assert f"--source {tmp_path}" in done.stderr
    assert run_command("inspect", "--source", tmp_path).returncode == 0


@pytest.mark.parametrize("named", ["head", "source", "neither"])
def test_missing_class_names_are_asked_for(named: str, capsys: pytest.CaptureFixture[str]) -> None:
    numbers, names = ["0", "1", "2"], ["ant", "bee", "cat"]
    head = Classes([*names, "dog"] if named == "head" else [], 4, "the head")
    source = Classes(names if named == "source" else numbers, 3, "photos")
    match_classes({0, 1}, source, head, "head", "choose another head")
    message = " ".join(capsys.readouterr().err.split())
    assert ("file of the head's class names" in message) == (named != "head")
    # With the names that are advised, the classes match.
    match = match_classes({0, 1}, Classes(names, 3, "photos"), Classes(["dog", *names], 4, "the head"), "head", "")
    assert match.rows == {0: 1, 1: 2, 2: 3}
    assert "positions" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, "{", "[]", '{"steps": "many", "seconds": "slow"}'])
def test_a_folder_that_is_no_finished_run_is_refused(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "run").mkdir()
    if content is not None:
        (tmp_path / "run" / "run.json").write_text(content)
    with refused(ConfigError, "encoder", tmp_path / "run") as caught:
        read_summary(tmp_path / "run")
    assert not re.search(r"Field required|Input should|BaseModel|https?:", str(caught.value))
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    merged = run_command("merge", tmp_path / "x.npz", tmp_path / "a", "--encoder", tmp_path / "run")
    assert (merged.returncode, merged.stderr.startswith("error: --encoder: ")) == (2, True)
    evaluated = run_command("evaluate", tmp_path / "run", "--data", tmp_path / "x.npz")
    assert (evaluated.returncode, evaluated.stderr.startswith("error: RUN: ")) == (2, True)


def test_a_message_names_a_place_once(tmp_path: Path) -> None:
    layout = build_layout("webdataset")
    shards = build_shards(layout)
    twice = [shards[0][0], shards[0][0]]
    writer = ArtifactWriter(Location(tmp_path / "a"), layout, {})
    with refused(DatamergeError, None, "shard 0", shards[0][0].key) as caught:
        write_shards(writer, {}, lambda shards: ((twice, []) for _ in shards), lambda done: None)
    assert str(caught.value).count("shard 0") == 1


def test_the_training_artifact_is_no_evaluation_artifact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a", build_layout("webdataset"))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    settings = {"artifact": str(tmp_path / "a"), "encoder": "mlp:3x4x5-6", "steps": 1, "arm": "mean-only"}
    for same in ("a", "copy"):
        config = TrainConfig(**settings, run=str(tmp_path / "run"), eval_artifact=str(tmp_path / same))  # type: ignore[arg-type]
        with refused(ConfigError, "eval_artifact", tmp_path / "a", "`eval_artifact`"):
            train(config)
    convert(tmp_path / "a", tmp_path / "z", format="zarr")
    train(TrainConfig(**settings, run=str(tmp_path / "run"), eval_artifact=str(tmp_path / "z")))  # type: ignore[arg-type]
    assert f"eval_artifact: {tmp_path / 'z'}" in capsys.readouterr().err


def _row(name: str, scores: int) -> ArmResult:
    measured = [
        Score(name=f"accuracy {i}/255", value=12.5, error=1.25, low=10, high=15, count=100) for i in range(scores)
    ]
    return ArmResult.model_validate(
        {
            "part": "pgd",
            "run": f"runs/{name}",
            "arm": name,
            "encoder": "mlp:1x2x2-2",
            "encoder_sha256": "0" * 64,
            "scores": measured,
            "images": 100,
            "rejected": [],
            "seconds": 3.0,
            "training": None,
            "settings": {},
            "details": {},
        }
    )


@pytest.mark.parametrize("width", [200, 80, 60, 40])
@pytest.mark.parametrize("scores", [1, 4, 9])
def test_tables_fit_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int, scores: int
) -> None:
    """No value is cut and every row has its name, even if the columns need several tables."""
    names = ["w/o AT", "AT-10-Avg", "AT-10-Factors"]
    monkeypatch.setenv("COLUMNS", str(width))
    print_rows(table_rows([_row(name, scores) for name in names]))
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert text.count("12.5 ± 1.2") == scores * len(names)
    assert width == 40 or all(f"accuracy {score}/255" in text for score in range(scores))
    tables = sum(line.split()[:1] == ["arm"] for line in lines)
    assert tables == sum(line.split()[:1] == ["w/o"] for line in lines)
    assert (tables == 1) == ((scores, width) in [(1, 80), (1, 200), (4, 200)])


def test_json_of_a_report_distinguishes_stray_files_from_damage(artifact: Path) -> None:
    _stray(artifact)
    (problem,) = json.loads(run_command("verify", artifact, "--json").stdout)["problems"]
    assert (problem["file"], problem["stray"]) == ("notes.txt", True)
    assert [found.stray for found in verify(artifact).problems] == [True]
    with pytest.raises(NotAnArtifact):
        verify(artifact.parent / "nothing")
