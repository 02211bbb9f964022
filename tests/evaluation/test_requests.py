"""What is refused, what is warned about, and the command line."""

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

from datamerge.evaluation import EvaluateConfig, Evaluation, evaluate
from datamerge.evaluation.cli import evaluate as command
from datamerge.runtime import load_settings
from storage_schemas import ConfigError, SourceError

MakeEncoder = Callable[[list[list[float]]], str]
MakeRun = Callable[..., str]
MakeHead = Callable[..., str]

IDENTITY = [[1.0, 0.0], [0.0, 1.0]]


def measure(*runs: str, data: Path, **settings: object) -> list[Evaluation]:
    flags = {"runs": list(runs), "data": str(data), "steps": 2, **settings}
    return evaluate(load_settings(EvaluateConfig, None, flags))


def test_bad_images_are_counted_and_listed(two_class: str, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "dark" / "broken.png").write_bytes(b"not a picture")
    baseline, again = measure(two_class, two_class, data=photos, head="outputs")
    assert (baseline.images, baseline.labelled) == (4, 4)
    assert [(image.sample, image.reason) for image in baseline.rejected] == [
        ("dark/broken.png", "not an image (13 bytes)")
    ]
    assert again.rejected == baseline.rejected
    errors = capsys.readouterr().err
    assert errors.count("1 of 5 images could not be used, e.g. dark/broken.png: not an image") == 1


def test_no_usable_image(two_class: str, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"")
    with pytest.raises(SourceError, match=r"none that can be used of 1; the first one: a\.png"):
        measure(two_class, data=folder)


def test_unknown_run(two_class: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUN '.*nowhere'.*no such folder"):
        measure(str(tmp_path / "nowhere"), data=photos)
    with pytest.raises(ConfigError, match=r"expected run\.json .* not finished"):
        measure(two_class, str(photos), data=photos)


@pytest.mark.parametrize("key", ["encoder", "original", "arm", "artifact", "seconds", "steps", "bytes", "config"])
def test_run_json_without_a_key(two_class: str, photos: Path, make_run: MakeRun, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"run\.json: .*{key}: Field required"):
        measure(make_run(two_class, two_class, changes={key: None}), data=photos)


@pytest.mark.parametrize(("content", "found"), [("{", "Expecting"), ("[]", "found list")])
def test_run_json_that_is_damaged(photos: Path, tmp_path: Path, content: str, found: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(ConfigError, match=found):
        measure(str(tmp_path / "run"), data=photos)


def test_a_run_that_was_moved_brings_its_weights(two_class: str, photos: Path, make_run: MakeRun) -> None:
    folder = Path(make_run("mlp:1x2x2-2@/gone/encoder.safetensors", two_class))
    shutil.copy(two_class.partition("@")[2], folder / "encoder.safetensors")
    (result,) = measure(str(folder), data=photos)
    assert result.embedding_loss_clean == 0.0


def test_weights_that_changed_since_the_training(
    two_class: str, photos: Path, make_run: MakeRun, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(make_run(two_class, two_class, changes={"encoder_sha256": "0" * 64}), data=photos)
    assert "are not those the training saw" in capsys.readouterr().err


def test_runs_of_different_shapes(two_class: str, photos: Path, make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match=r"pixels \(1, 2, 2\).*found \(1, 3, 3\)"):
        measure(two_class, "mlp:1x3x3-2", data=photos)
    with pytest.raises(ConfigError, match=r"embeddings of one width.*found 2 .* and 3"):
        measure(make_run(two_class, "mlp:1x2x2-3"), data=photos)


def test_head_of_another_width(two_class: str, photos: Path, make_head: MakeHead) -> None:
    with pytest.raises(ConfigError, match="width 2"):
        measure(two_class, data=photos, head=make_head([[1.0, 0.0, 0.0]]))


def test_label_outside_the_head(two_class: str, photos: Path, make_head: MakeHead) -> None:
    with pytest.raises(ConfigError, match=r"labels from 0 to 0.*found label 1 \(light\)"):
        measure(two_class, data=photos, head=make_head([[1.0, 0.0]]))


def test_class_names_that_do_not_fit(two_class: str, photos: Path, make_head: MakeHead, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("dark\n\nlight\nmoon\n")
    with pytest.raises(ConfigError, match="head's 2 classes, found 3"):
        measure(two_class, data=photos, head=make_head(IDENTITY), class_names=str(names))
    with pytest.raises(ConfigError, match="add --head or drop class_names"):
        measure(two_class, data=photos, class_names=str(names))
    with pytest.raises(ConfigError, match="one class name a line, found No such file"):
        measure(two_class, data=photos, head=make_head(IDENTITY), class_names=str(tmp_path / "none.txt"))


def test_fewer_classes_than_the_head_has(
    two_class: str, photos: Path, make_head: MakeHead, capsys: pytest.CaptureFixture[str]
) -> None:
    measure(two_class, data=photos, head=make_head([*IDENTITY, [-1.0, -1.0]]))
    assert "taken as positions in the head" in capsys.readouterr().err


def test_labels_without_head_and_head_without_labels(
    two_class: str, photos: Path, tmp_path: Path, make_head: MakeHead, capsys: pytest.CaptureFixture[str]
) -> None:
    (result,) = measure(two_class, data=photos)
    assert (result.accuracy_clean, result.accuracy_robust, result.labelled) == (None, None, 0)
    assert "hint: the images have labels; add --head" in capsys.readouterr().err
    (tmp_path / "flat").mkdir()
    Image.new("L", (2, 2), 100).save(tmp_path / "flat" / "a.png")
    (result,) = measure(two_class, data=tmp_path / "flat", head=make_head(IDENTITY))
    assert (result.accuracy_clean, result.embedding_loss_clean_se) == (None, None)
    assert "has no labels" in capsys.readouterr().err


def test_random_weights_are_announced(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measure("mlp:1x2x2-2", data=photos)
    assert capsys.readouterr().err.count("encoder mlp:1x2x2-2 has random weights") == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epsilon": "2"}, "did you mean 2/255"),
        ({"epsilon": "1/510", "on_grid": True}, "smaller than 1/255"),
        ({"step_size": "0"}, "step_size: expected more than 0"),
        ({"steps": 0}, "steps"),
        ({"limit": 0}, "limit"),
        ({"device": "warp"}, "device: 'warp' cannot be used here"),
        ({"batchsize": 3}, "did you mean batch_size"),
        ({"data": ""}, "add --data SOURCE"),
        ({"runs": []}, "name at least one RUN"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, object], message: str, photos: Path) -> None:
    flags = {"runs": ["mlp:1x2x2-2"], "data": str(photos), **settings}
    with pytest.raises(ConfigError, match=message):
        evaluate(load_settings(EvaluateConfig, None, flags))


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        ({}, "1/255"),
        ({"epsilon": "8/255"}, "2/255"),
        ({"epsilon": "6/255"}, "1/170"),
        ({"epsilon": "6/255", "on_grid": True}, "1/255"),
        ({"step_size": "1/510"}, "1/510"),
    ],
)
def test_default_step_size(settings: dict[str, object], step: str) -> None:
    config = load_settings(EvaluateConfig, None, {"runs": ["mlp:1x2x2-2"], "data": "d", **settings})
    assert str(config.attack_settings().step_size) == step


def test_cli_prints_json_and_writes_the_same_file(
    two_class: str, photos: Path, make_run: MakeRun, tmp_path: Path
) -> None:
    output = tmp_path / "new" / "result.json"
    run = make_run(two_class, two_class)
    arguments = [two_class, run, "--data", str(photos), "--head", "outputs", "--json", "-o", str(output)]
    result = CliRunner().invoke(command, [*arguments, "--steps", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    content = json.loads(result.stdout)
    assert content == json.loads(output.read_text())
    assert [row["arm"] for row in content["evaluations"]] == ["w/o AT", "avg"]
    assert content["config"]["steps"] == 2
    assert Evaluation.model_validate(content["evaluations"][1]).run == run


def test_cli_prints_a_table_without_a_terminal(two_class: str, photos: Path, make_run: MakeRun) -> None:
    run = make_run(two_class, two_class)
    arguments = [two_class, run, "--data", str(photos), "--head", "outputs"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    rows = [line.split() for line in result.stdout.splitlines()]
    (row,) = [row for row in rows if row[:1] == ["avg"]]
    assert row[:2] == ["avg", "my-run"]
    assert " ".join(row).endswith("100.0 ± 0.0 50.0 ± 25.0 4 " + " ".join(row[-6:]))
    assert " ".join(row).endswith("12.5 s 3.0 MB")
    assert "epsilon 2/255, 20 steps of 1/255" in result.stdout


def test_cli_reads_settings_from_a_file(two_class: str, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(f"runs = [{json.dumps(two_class)}]\ndata = {json.dumps(str(photos))}\nsteps = 1\nlimit = 2\n")
    arguments = ["--config", str(file), "--limit", "1", "--json"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    (row,) = json.loads(result.stdout)["evaluations"]
    assert (row["images"], row["steps"]) == (1, 1)


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
        [two_class, *data, "-o", str(photos)],
        [two_class, *data, "-o", str(no_head / "out.json")],
        [two_class, *data, "-o", "s3://bucket/out.json"],
        [two_class],
        data,
    ):
        assert run_command(*arguments) == 2, arguments
        errors = capsys.readouterr().err
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


def test_a_full_disk_is_one_line_and_loses_nothing(
    two_class: str,
    photos: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    flags = [two_class, "--data", str(photos), "--steps", "2", "-o", str(tmp_path / "out.json")]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run_command(*flags) == 1
    shown = capsys.readouterr()
    assert "w/o AT" in shown.out, "the results are on the terminal at least"
    assert shown.err.splitlines()[-1] == (
        f"error: {tmp_path}/out.json: cannot write: No space left on device; mend that and run the same command again"
    )
    flags = ["embedding", *flags[:-1], str(tmp_path / "out")]
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert run_command(*flags) == 1
    assert re.search(r"error: \S+identity\.json: cannot write: No space", capsys.readouterr().err)
    assert run_command(*flags) == 0


def test_a_closed_folder_is_refused_before_the_work(
    two_class: str,
    photos: Path,
    tmp_path: Path,
    run_command: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The tests may run as root, who may write anywhere.
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)
    for part in ("both", "embedding"):
        assert run_command(part, two_class, "--data", str(photos), "-o", str(tmp_path / "out")) == 2
        assert capsys.readouterr().err.startswith("error: output: expected a folder to write in")
