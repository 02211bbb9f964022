"""Refusals, warnings and the command line of evaluations."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from datamerge.evaluation import ArmResult, EvaluateConfig, Results, evaluate
from datamerge.evaluation.cli import evaluate as command
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, SourceError
from tests.support.refusals import refused

MakeEncoder = Callable[[list[list[float]]], str]
MakeRun = Callable[..., str]
MakeHead = Callable[..., str]

IDENTITY = [[1.0, 0.0], [0.0, 1.0]]


def measure(*runs: str, data: Path, **settings: object) -> Results:
    flags = {"runs": list(runs), "data": str(data), "steps": 2, **settings}
    return evaluate(load_settings(EvaluateConfig, None, flags))


def test_bad_images_are_counted_and_listed(two_class: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "dark" / "broken.png").write_bytes(b"not a picture")
    baseline, again = measure(two_class, two_class, data=photos, head="outputs")
    assert (baseline.images, baseline.score("accuracy clean").count) == (4, 4)
    assert [(image.sample, image.reason) for image in baseline.rejected] == [
        ("dark/broken.png", "not an image (13 bytes)")
    ]
    assert again.rejected == baseline.rejected
    errors = capsys.readouterr().err
    assert errors.count("1 of 5 images") == errors.count("dark/broken.png: ") == 1


def test_data_without_a_usable_image_are_refused(two_class: str, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"no image")
    with refused(SourceError, None, folder, " 1", "a.png"):
        measure(two_class, data=folder)


def test_unknown_runs_are_refused(two_class: str, photos: Path, tmp_path: Path) -> None:
    with refused(ConfigError, "runs", tmp_path / "nowhere"):
        measure(str(tmp_path / "nowhere"), data=photos)
    with refused(ConfigError, "runs", photos, "run.json"):
        measure(two_class, str(photos), data=photos)


@pytest.mark.parametrize("key", ["encoder", "original", "arm", "artifact", "seconds", "steps", "bytes", "config"])
def test_run_json_without_a_key_is_refused(two_class: str, photos: Path, make_run: MakeRun, key: str) -> None:
    with refused(ConfigError, "runs", "run.json", f" {key}: "):
        measure(make_run(two_class, two_class, changes={key: None}), data=photos)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_damaged_run_json_is_refused(photos: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with refused(ConfigError, "runs", tmp_path / "run" / "run.json"):
        measure(str(tmp_path / "run"), data=photos)


def test_a_moved_run_is_evaluated_with_its_weights(two_class: str, photos: Path, make_run: MakeRun) -> None:
    folder = Path(make_run("mlp:1x2x2-2@/gone/encoder.safetensors", two_class))
    shutil.copy(two_class.partition("@")[2], folder / "encoder.safetensors")
    (result,) = measure(str(folder), data=photos)
    assert result.score("loss clean").value == 0


def test_weights_that_changed_since_the_training_are_reported(
    two_class: str, photos: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(make_run(two_class, two_class, changes={"encoder_sha256": "0" * 64}), data=photos)
    errors = capsys.readouterr().err
    assert "my-run'" in errors
    assert f"{'0' * 12} then" in errors


@pytest.mark.parametrize(
    ("original", "facts"), [("mlp:1x3x3-2", ("1x2x2", "1x3x3")), ("mlp:1x2x2-3", (" 2 ", " 3 "))]
)
def test_a_run_and_its_original_of_different_shapes_are_refused(
    two_class: str, photos: Path, make_run: MakeRun, original: str, facts: tuple[str, str]
) -> None:
    with refused(ConfigError, "runs", *facts):
        measure(make_run(two_class, original), data=photos)


def test_a_head_of_another_width_is_refused(two_class: str, photos: Path, make_head: MakeHead) -> None:
    with refused(ConfigError, "head", "width 2"):
        measure(two_class, data=photos, head=make_head([[1.0, 0.0, 0.0]]))


def test_a_label_outside_the_head_is_refused(two_class: str, photos: Path, make_head: MakeHead) -> None:
    with refused(ConfigError, "head", " 1 (light)"):
        measure(two_class, data=photos, head=make_head([[1.0, 0.0]]))


def test_class_names_that_do_not_match_are_refused(
    two_class: str, photos: Path, make_head: MakeHead, tmp_path: Path
) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dark\nlight\nmoon\n")
    with refused(ConfigError, "class_names", " 2 ", " 3"):
        measure(two_class, data=photos, head=make_head(IDENTITY), class_names=str(names))
    with refused(ConfigError, "class_names", "head", " none"):
        measure(two_class, data=photos, class_names=str(names))
    with refused(ConfigError, "class_names", tmp_path / "none.txt"):
        measure(two_class, data=photos, head=make_head(IDENTITY), class_names=str(tmp_path / "none.txt"))


def test_fewer_classes_than_the_head_has_are_reported(
    two_class: str, photos: Path, make_head: MakeHead, capsys: pytest.CaptureFixture[str]
) -> None:
    head = make_head([*IDENTITY, [-1.0, -1.0]])
    measure(two_class, data=photos, head=head)
    errors = capsys.readouterr().err
    assert f"{photos} has 2 classes" in errors
    assert f"'{head}' has 3" in errors


def test_missing_heads_and_missing_labels_are_reported(
    two_class: str, photos: Path, tmp_path: Path, make_head: MakeHead, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = measure(two_class, data=photos)
    assert [score.name for score in result.scores] == ["loss clean", "loss adv."]
    assert "hint: " in capsys.readouterr().err
    (tmp_path / "flat").mkdir()
    Image.new("L", (2, 2), 100).save(tmp_path / "flat" / "a.png")
    (result,) = measure(two_class, data=tmp_path / "flat", head=make_head(IDENTITY))
    assert [(score.name, score.error) for score in result.scores] == [("loss clean", None), ("loss adv.", None)]
    errors = capsys.readouterr().err
    assert str(tmp_path / "flat") in errors
    assert "labels" in errors


def test_random_weights_are_announced(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure("mlp:1x2x2-2", data=photos)
    assert capsys.readouterr().err.count("encoder mlp:1x2x2-2 ") == 1


@pytest.mark.parametrize(
    ("settings", "field", "fact"),
    [
        ({"epsilon": "2"}, "epsilon", "2/255"),
        ({"step_size": "0"}, "step_size", " 0"),
        ({"steps": 0}, "steps", " 0"),
        ({"limit": 0}, "limit", " 0"),
        ({"sample": 5}, "sample", " 5"),
        ({"device": "warp"}, "device", "'warp'"),
        ({"batchsize": 3}, "batchsize", "batch_size"),
        ({"on_grid": True}, "on_grid", "grid"),
        ({"data": ""}, "data", "''"),
        ({"runs": []}, "runs", "[]"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, object], field: str, fact: str, photos: Path) -> None:
    flags = {"runs": ["mlp:1x2x2-2"], "data": str(photos), **settings}
    with refused(ConfigError, field, fact):
        evaluate(load_settings(EvaluateConfig, None, flags))


def test_a_ball_without_another_grid_point_is_refused(photos: Path) -> None:
    with refused(ConfigError, "epsilon", "1/510"):
        measure("mlp:1x2x2-2", data=photos, epsilon="1/510", grid=True)


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, "1/255"),
        ({"epsilon": "8/255"}, "2/255"),
        ({"epsilon": "6/255"}, "1/170"),
        ({"epsilon": "6/255", "grid": True}, "1/255"),
        ({"step_size": "1/510"}, "1/510"),
    ],
)
def test_default_step_size(settings: dict[str, object], step: str) -> None:
    config = load_settings(EvaluateConfig, None, {"runs": ["mlp:1x2x2-2"], "data": "d", **settings})
    (attack,) = config.attacks().values()
    assert str(attack.step_size) == step


def test_cli_prints_json_and_writes_the_same_file(
    two_class: str, photos: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "results"
    run = make_run(two_class, two_class)
    arguments = [two_class, run, "--data", str(photos), "--head", "outputs", "--json", "-o", str(output)]
    result = CliRunner().invoke(command, [*arguments, "--steps", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content == json.loads((output / "results.json").read_text())
    assert [row["arm"] for row in content["arms"]] == ["w/o AT", "avg"]
    assert content["arms"][0]["settings"]["steps"] == 2
    assert ArmResult.model_validate(content["arms"][1]).run == run
    assert "accuracy robust" in (output / "report.md").read_text()


def test_cli_prints_a_table_without_a_terminal(two_class: str, photos: Path, make_run: MakeRun) -> None:
    run = make_run(two_class, two_class)
    arguments = [two_class, run, "--data", str(photos), "--head", "outputs"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False, env={"COLUMNS": "200"})
    rows = [line.split() for line in result.stdout.splitlines()]
    (row,) = [" ".join(row) for row in rows if row[:1] == ["avg"]]
    assert re.fullmatch(r"avg my-run .* 100\.0 ± 0\.0 50\.0 ± 25\.0 4 [\d.]+ s 12\.5 s 3\.0 MB", row)
    assert "epsilon 2/255, 20 steps of 1/255" in result.stdout


def test_cli_reads_settings_from_a_file(two_class: str, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"runs = [{json.dumps(two_class)}]\ndata = {json.dumps(str(photos))}\nsteps = 1\nlimit = 2\n")
    arguments = ["--config", str(file), "--limit", "1", "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    (row,) = json.loads(result.stdout)["arms"]
    assert (row["images"], row["settings"]["steps"]) == (1, 1)


def test_wrong_requests_exit_with_2_and_one_line(
    two_class: str,
    photos: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    no_head = tmp_path / "no-head.safetensors"
    no_head.write_bytes(b"nothing")
    data = ["--data", str(photos)]
    for arguments in (
        [two_class, *data, "--head", str(tmp_path / "none.safetensors")],
        [two_class, *data, "--head", str(no_head)],
        [str(tmp_path / "nowhere"), *data],
        [str(photos), *data],
        [two_class, *data, "--epsilon", "2"],
        [two_class, "--data", str(tmp_path / "nowhere")],
        [two_class, *data, "-o", str(tmp_path / "out.json")],
        [two_class, *data, "-o", str(no_head / "out")],
        [two_class, *data, "-o", "s3://bucket/out"],
        [two_class],
        data,
    ):
        assert run_command(*arguments) == 2, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


def test_a_full_disk_is_one_line_and_the_same_command_continues(
    two_class: str,
    photos: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for part in ("pgd", "embedding"):
        flags = [part, two_class, "--data", str(photos), "--steps", "2", "-o", str(tmp_path / part)]
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            assert run_command(*flags) == 1
        assert re.search(r"error: \S+identity\.json: ", capsys.readouterr().err)
        assert run_command(*flags) == 0


def test_a_read_only_folder_is_refused_before_the_work(
    two_class: str,
    photos: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for part in ("pgd", "embedding"):
        assert run_command(part, two_class, "--data", str(photos), "-o", str(tmp_path / "out")) == 2
        assert capsys.readouterr().err.startswith(("error: output: ", "error: --output: "))
