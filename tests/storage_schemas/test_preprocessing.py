"""The record of a preprocessing: its defaults, parsing, comparison and one-line description."""

from __future__ import annotations

import json
from typing import Any

import pytest

from storage_schemas import ConfigError
from storage_schemas.schema.preprocessing import Preprocessing
from tests.support.refusals import refused

CLIP = Preprocessing(shape=(3, 224, 224), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
SIGLIP = Preprocessing(shape=(3, 224, 224), resize="squash", mean=(0.5,), std=(0.5,))
BORDER = Preprocessing(shape=(3, 32, 48), resize="longest", scale=(40, 60), rounding="nearest", fill=(1, 2, 3))


def test_defaults_follow_from_the_shape() -> None:
    grey = Preprocessing(shape=(1, 6, 5), mean=(0.5,), std=(0.25,))
    assert (grey.scale, grey.fill, grey.size) == ((6, 5), (0,), (6, 5))
    assert (SIGLIP.mean, SIGLIP.fill) == ((0.5, 0.5, 0.5), (0, 0, 0))


@pytest.mark.parametrize("preprocessing", [CLIP, SIGLIP, BORDER, CLIP.of_exact_size(), CLIP.geometry], ids=str)
def test_records_are_read_back(preprocessing: Preprocessing) -> None:
    record = json.loads(json.dumps(preprocessing.record()))
    assert Preprocessing.read(record, "run.json") == preprocessing
    assert Preprocessing.of_artifact({"preprocessing": record}, "artifact") == preprocessing


def test_records_of_the_first_release_are_read() -> None:
    resized = Preprocessing.read(
        {"shape": [3, 8, 6], "resize": "bicubic, shorter side", "crop": "centre"}, "manifest.json"
    )
    assert resized == Preprocessing(shape=(3, 8, 6))
    assert Preprocessing.read({"shape": [3, 8, 6], "resize": "none"}, "manifest.json").resize == "none"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        (None, "preprocessing"),
        ([], "preprocessing"),
        ({}, "preprocessing.shape"),
        ({"shape": 5}, "preprocessing.shape"),
        ({"shape": [3, 224]}, "preprocessing.shape.2"),
        ({"shape": [10**12, 1, 1]}, "preprocessing.shape.0"),
        ({"shape": [3, 0, 224]}, "preprocessing.shape.1"),
        ({"shape": [3, 8, 8], "resize": []}, "preprocessing.resize"),
        ({"shape": [3, 8, 8], "resize": "by hand"}, "preprocessing.resize"),
        ({"shape": [3, 8, 8], "crop": "left"}, "preprocessing.crop"),
        ({"shape": [3, 8, 8], "scale": [8, -1]}, "preprocessing.scale.1"),
        ({"shape": [3, 8, 8], "fill": [256]}, "preprocessing.fill.0"),
        ({"shape": [3, 8, 8], "mean": [0.1, 0.2]}, "preprocessing.mean"),
        ({"shape": [3, 8, 8], "mean": [float("nan")]}, "preprocessing.mean"),
        ({"shape": [3, 8, 8], "std": [0.5, 0.0, 0.5]}, "preprocessing.std.1"),
    ],
    ids=str,
)
def test_invalid_records_are_refused_with_the_field(record: Any, field: str) -> None:
    with refused(ConfigError, None, "encoder.safetensors", f"{field}:"):
        Preprocessing.read(record, "encoder.safetensors")


@pytest.mark.parametrize("record", [None, "CLIP's", {}, {"shape": [3, 8, 8]}, {"interpolation": "bicubic"}], ids=str)
def test_provenances_without_a_complete_record_give_none(record: Any) -> None:
    """From other writers, or from unions of artifacts with different preprocessing."""
    assert Preprocessing.of_artifact({} if record is None else {"preprocessing": record}, "artifact") is None


def test_differences_are_described_in_words() -> None:
    assert CLIP.differences(CLIP) == []
    assert CLIP.differences(SIGLIP) == [
        "resize shortest, not squash",
        "mean (0.48, 0.46, 0.41), not 0.5",
        "std (0.27, 0.26, 0.28), not 0.5",
    ]
    assert CLIP.differences(SIGLIP, normalised=False) == ["resize shortest, not squash"]
    # The crop's offset does not matter where nothing is cropped.
    assert CLIP.model_copy(update={"offset": "down"}).differences(SIGLIP) == CLIP.differences(SIGLIP)
    assert CLIP.differences(BORDER)[0] == "shape 3x224x224, not 3x32x48"


@pytest.mark.parametrize(
    ("one", "changes", "differs"),
    [
        (CLIP, {"mean": (0.48 + 1e-8, 0.46, 0.41)}, False),
        (CLIP, {"mean": (0.48 + 1e-4, 0.46, 0.41)}, True),
        (CLIP, {"mean": None, "std": None}, False),
        (CLIP, {"rounding": "nearest"}, True),
        (CLIP, {"offset": "down"}, True),
        (CLIP, {"fill": (7, 7, 7)}, False),
        (CLIP, {"alpha": "white"}, True),
        (CLIP, {"resize": "none", "interpolation": "box"}, False),
        (SIGLIP, {"rounding": "nearest", "offset": "down", "fill": (7, 7, 7)}, False),
        (SIGLIP, {"scale": (256, 256)}, True),
        (SIGLIP.model_copy(update={"scale": (256, 256)}), {"offset": "down"}, True),
        (CLIP.model_copy(update={"scale": (200, 200)}), {"fill": (7, 7, 7)}, True),
        (BORDER, {"fill": (7, 7, 7)}, True),
    ],
)
def test_only_settings_that_change_pixels_differ(one: Preprocessing, changes: dict[str, Any], differs: bool) -> None:
    other = one.model_copy(update=changes)
    assert bool(one.differences(other)) == bool(other.differences(one)) == differs


@pytest.mark.parametrize(
    ("preprocessing", "line"),
    [
        (
            CLIP.model_copy(update={"scale": (256, 256), "alpha": "white", "std": None}),
            "3x224x224: shorter side to 256, bicubic, centre cropped, transparent pixels on white, "
            "mean (0.48, 0.46, 0.41)",
        ),
        (SIGLIP, "3x224x224: squashed to 224x224, bicubic, mean 0.5, std 0.5"),
        (BORDER, "3x32x48: longer side to 40x60, bicubic, the rest filled with (1, 2, 3)"),
        (CLIP.geometry.of_exact_size(), "3x224x224: images of this size as they are"),
    ],
)
def test_the_text_is_a_one_line_description(preprocessing: Preprocessing, line: str) -> None:
    assert str(preprocessing) == line
