"""Artifacts with weights: parsing, and round trips."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage_schemas import ConfigError
from tests.support.refusals import refused
from trainer import TrainConfig
from trainer.weights import spelt, weighted


@pytest.mark.parametrize(
    ("text", "url", "weight"),
    [
        ("photos", "photos", 1),
        ("photos=0.7", "photos", 0.7),
        ("photos=2", "photos", 2),
        ("s3://bucket/photos=1e-3", "s3://bucket/photos", 0.001),
        ("s3://bucket/year=2024/", "s3://bucket/year=2024/", 1),
        ("s3://bucket/year=2024=0.5", "s3://bucket/year=2024", 0.5),
        ("kind=photos", "kind=photos", 1),
        ("=2", "=2", 1),
        ("photos==1", "photos=", 1),
        ("python:lin:encoder,image_size=8", "python:lin:encoder,image_size=8", 1),
    ],
)
def test_texts_are_parsed_into_artifact_and_weight(text: str, url: str, weight: float) -> None:
    assert weighted(text) == (url, weight)
    assert weighted(spelt(url, weight)) == (url, weight)


@given(st.text("ab=12./:", min_size=1), st.floats(1e-9, 1000))
def test_artifact_and_weight_round_trip(url: str, weight: float) -> None:
    weight = float(f"{weight:.15g}")
    assert weighted(spelt(url, weight)) == (url, weight)


@pytest.mark.parametrize("url", ["photos=", "photos=2024", "photos=nan"])
def test_ambiguous_names_are_spelt_with_their_weight(url: str) -> None:
    assert spelt(url, 1) == f"{url}=1"
    assert weighted(spelt(url, 1)) == (url, 1)


def test_an_existing_folder_is_taken_by_its_whole_name(tmp_path: Path) -> None:
    folder = tmp_path / "year=2024"
    folder.mkdir()
    for text in (str(folder), f"file://{folder}"):
        assert weighted(text) == (text, 1)
    assert weighted(f"{folder}=0.5") == (str(folder), 0.5)
    assert spelt(str(folder), 1) == str(folder)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "2024"])
@pytest.mark.parametrize("several", [False, True])
def test_an_impossible_weight_is_refused(weight: str, several: bool) -> None:
    text = f"photos={weight}"
    with refused(ConfigError, "artifact", "above 0", "1000", "photos", weight, f"{text}=1"):
        TrainConfig(artifact=["other", text] if several else text, run="run", steps=1)


@pytest.mark.parametrize("text", ["photos=", "photos= "])
def test_an_empty_weight_is_refused(text: str) -> None:
    """Otherwise an empty shell variable in place of the weight would make `=` a part of the name."""
    with refused(ConfigError, "artifact", f"{text}0.5", f"{text}=1"):
        TrainConfig(artifact=text, run="run", steps=1)


@pytest.mark.parametrize("value", [[], [""], "", 3, ["photos", 3], {"photos": 0.5}])
def test_values_that_name_no_artifact_are_refused(value: object) -> None:
    with refused(ConfigError, "artifact", "list"):
        TrainConfig.model_validate({"artifact": value, "run": "run", "steps": 1})


def test_a_list_of_one_artifact_equals_that_artifact() -> None:
    one = TrainConfig(artifact=["photos=2"], run="run", steps=1)
    assert one == TrainConfig(artifact="photos=2", run="run", steps=1)
    assert one.artifacts == [("photos", 2)]


@pytest.mark.parametrize(("value", "expected"), [("all", "all"), ("4096", 4096), (1, 1)])
def test_a_shuffle_window_is_a_number_or_all(value: object, expected: object) -> None:
    settings = {"artifact": "photos", "run": "run", "steps": 1, "shuffle_window": value}
    assert TrainConfig.model_validate(settings).shuffle_window == expected


@pytest.mark.parametrize("value", [0, -1, "0", "1e6", "everything", True, 1.5])
def test_other_shuffle_windows_are_refused(value: object) -> None:
    with refused(ConfigError, "shuffle_window", "all"):
        TrainConfig.model_validate({"artifact": "photos", "run": "run", "steps": 1, "shuffle_window": value})
