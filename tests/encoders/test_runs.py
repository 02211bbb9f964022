"""The encoder of a training run's folder: its weights, preprocessing, and the encoder that it started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from datamerge.encoders import load_encoder, save_encoder
from datamerge.encoders.runs import encoder_spec, resolve, started_from, with_tag_of_run
from storage_schemas import ConfigError
from storage_schemas.schema.run import read_summary
from tests.support.refusals import refused
from tests.support.runs import BARE, write_run

MLP = "mlp:1x4x4-6"
TAG = "open_clip:ViT-L-14-quickgelu/openai"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run of an mlp, with its weights."""
    encoder = load_encoder(MLP)
    spec = write_run(tmp_path / "run", MLP, sha256=encoder.sha256, started=encoder.sha256)
    save_encoder(encoder, spec.partition("@")[2])
    _change(tmp_path / "run", preprocessing=encoder.preprocessing.record())
    return tmp_path / "run"


def _change(folder: Path, **values: object) -> None:
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | values))


def test_a_moved_run_is_loaded_from_where_it_is(trained: Path, tmp_path: Path) -> None:
    moved = trained.rename(tmp_path / "elsewhere")
    found = resolve(str(moved))
    assert found.encoder.spec == f"{MLP}@{moved}/encoder.safetensors"
    assert found.encoder.preprocessing == read_summary(moved).preprocessing
    assert found.run is not None
    assert found.run["url"] == str(moved)


def test_a_run_whose_weights_were_replaced_is_refused(trained: Path) -> None:
    """Weights that record another preprocessing, or none."""
    record = load_encoder(MLP).preprocessing.record()
    _change(trained, preprocessing=record | {"mean": [0.25]})
    with refused(ConfigError, "encoder", trained / "run.json", trained / "encoder.safetensors", "mean", 0.25):
        resolve(str(trained))
    _change(trained, preprocessing=record)
    file = trained / "encoder.safetensors"
    save_file(load_file(file), file)
    with refused(ConfigError, "encoder", trained / "run.json", file):
        encoder_spec(str(trained))
    file.write_bytes(b"torn")
    with refused(ConfigError, "encoder", file):
        encoder_spec(str(trained))


def test_a_damaged_record_is_refused(trained: Path) -> None:
    _change(trained, preprocessing={"shape": [1, 4]})
    with refused(ConfigError, "encoder", trained / "run.json", "preprocessing.shape"):
        resolve(str(trained))


def test_a_run_keeps_the_tag_that_it_started_from(tmp_path: Path) -> None:
    first = write_run(tmp_path / "1", TAG, sha256="a")
    second = write_run(tmp_path / "2", first, sha256="b", started="a")
    assert second == f"{TAG}@{tmp_path}/2/encoder.safetensors"
    assert with_tag_of_run(second) == second
    assert started_from(second) == started_from(first) == TAG


def test_an_older_run_gets_the_tag_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From its record, in place and moved, and through the runs before it; one line reports it."""
    first = write_run(tmp_path / "1", TAG, sha256="a", older=True)
    second = write_run(tmp_path / "2", first, sha256="b", started="a", older=True)
    assert first == f"{BARE}@{tmp_path}/1/encoder.safetensors"
    for number, spec in enumerate((first, second), 1):
        expected = f"{TAG}@{tmp_path}/{number}/encoder.safetensors"
        assert with_tag_of_run(spec) == encoder_spec(str(tmp_path / str(number)))[0] == expected
        assert started_from(spec) == started_from(expected) == TAG
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{tmp_path}/{number}/encoder.safetensors" in line
        assert TAG in line
    moved = (tmp_path / "2").rename(tmp_path / "elsewhere")
    (moved / "encoder.safetensors").touch()
    assert encoder_spec(str(moved))[0] == f"{TAG}@{moved}/encoder.safetensors"


def test_a_newer_run_of_an_older_one_has_the_tag(tmp_path: Path) -> None:
    """The older run got its tag back when the newer one began, so the newer record has it."""
    first = write_run(tmp_path / "1", TAG, sha256="a", older=True)
    second = write_run(tmp_path / "2", with_tag_of_run(first), sha256="b", started="a")
    assert second == f"{TAG}@{tmp_path}/2/encoder.safetensors"
    assert started_from(second) == TAG


def test_a_chain_of_runs_started_from_its_first_file(tmp_path: Path) -> None:
    full = f"{BARE}@{tmp_path}/epoch_3.pt"
    first = write_run(tmp_path / "1", full, sha256="a")
    second = write_run(tmp_path / "2", first, sha256="b", started="a")
    assert started_from(second) == full
    assert started_from(full) == full


def test_a_chain_is_not_followed_into_another_run(tmp_path: Path) -> None:
    """The first run was trained again after the second one began."""
    first = write_run(tmp_path / "1", TAG, sha256="another", older=True)
    second = write_run(tmp_path / "2", first, started="a", older=True)
    assert with_tag_of_run(second) == second
    assert started_from(second) == first


def test_the_tag_is_known_without_the_run_between(tmp_path: Path) -> None:
    """The text tower is the tag's, even if the run that tuned the image tower first is gone."""
    second = write_run(tmp_path / "2", write_run(tmp_path / "1", TAG, sha256="a"), started="a")
    shutil.rmtree(tmp_path / "1")
    assert started_from(second) == started_from(str(tmp_path / "2")) == TAG
    tuned = f"{TAG}@{tmp_path}/tuned.pt"
    write_run(tmp_path / "3", tuned)
    assert started_from(str(tmp_path / "3")) == tuned


@pytest.mark.parametrize("damage", ["gone", "torn", "circle"])
def test_a_chain_that_cannot_be_followed_gives_no_tag(tmp_path: Path, damage: str) -> None:
    first = write_run(tmp_path / "1", TAG, sha256="a", older=True)
    second = write_run(tmp_path / "2", first, started="a", older=True)
    if damage == "gone":
        shutil.rmtree(tmp_path / "1")
    elif damage == "torn":
        (tmp_path / "1/run.json").write_text("{")
    else:
        _change(tmp_path / "1", original=second, original_sha256="new")
    assert with_tag_of_run(second) == second


@pytest.mark.parametrize("spec", [MLP, "timm:resnet18", f"{BARE}@/nowhere/encoder.safetensors", TAG])
def test_other_specs_are_left_alone(spec: str) -> None:
    assert with_tag_of_run(spec) == started_from(spec) == spec
