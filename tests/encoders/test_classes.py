"""Classes are matched with the rows of a head by name wherever both have names."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from datamerge.encoders.classes import (
    Classes,
    Match,
    canonical_names,
    imagenet_names,
    imagenet_synsets,
    match_classes,
)
from storage_schemas import ConfigError
from tests.support.refusals import refused


def _match(names: Sequence[str], rows: Sequence[str] | int, labels: Collection[int] | None = None) -> Match:
    count = rows if isinstance(rows, int) else len(rows)
    head = Classes(() if isinstance(rows, int) else rows, count, "head 'h'")
    used = range(len(names)) if labels is None else labels
    return match_classes(set(used), Classes(names, len(names), "photos"), head, "head", "choose another `head`")


@pytest.mark.parametrize(
    ("names", "rows", "expected"),
    [
        (["cat", "dog"], ["cat", "dog"], [0, 1]),
        (["cat", "dog"], ["dog", "ant", "cat"], [2, 0]),
        (["pirate_ship", "Caf\u00e9"], ["cafe\u0301", " Pirate Ship"], [1, 0]),
        (["Dog", "dog"], ["dog", "DOG"], [1, 0]),  # exact names first
        (["crane", "ant", "crane"], ["ant", "crane", "crane"], [1, 0, 2]),  # ImageNet has two cranes
        (["0", "1", "2"], ["zero", "one", "two"], [0, 1, 2]),  # numbers do not count as names
        (["0", "1", "2"], ["2", "0", "1"], [1, 2, 0]),
        (["n01440764", "n02018207"], ["goldfish", "tench", "American coot"], [1, 2]),
        (["n01440764", "n01443537"], ["goldfish, Carassius auratus", "tench, Tinca tinca"], [1, 0]),
        (["goldfish", "tench"], ["n01440764", "n01443537"], [1, 0]),
    ],
)
def test_classes_are_matched_to_rows_by_name(names: list[str], rows: list[str], expected: list[int]) -> None:
    match = _match(names, rows)
    assert [match.rows[label] for label in range(len(names))] == expected
    assert list(match.names) == rows


def test_synsets_are_matched_to_an_imagenet_head_without_names(capsys: pytest.CaptureFixture[str]) -> None:
    """Class folders of Imagenette, and a classifier of timm."""
    names = ["n01440764", "n02102040", "n03888257"]
    match = _match(names, 1000)
    assert [match.rows[label] for label in range(3)] == [0, 217, 701]
    assert match.names[701] == "n03888257"
    assert "synsets" in capsys.readouterr().err


def test_all_synsets_match_open_clips_names() -> None:
    match = _match(imagenet_synsets(), imagenet_names())
    assert [match.rows[label] for label in range(1000)] == [*range(1000)]
    assert canonical_names(["tench", "no such thing"]) == ["n01440764", ""]


@pytest.mark.parametrize(
    ("names", "rows", "facts"),
    [
        (["cat", "dog", "eel"], ["dog", "cat", "ant"], ("1", "'eel'", "'ant'")),
        (["cat", "dog"], ["katze", "hund"], ("2", "'cat'", "'katze'")),
        (["crane", "ant"], ["crane", "ant", "crane"], ("'crane'", "several")),
        (["Cat", "cat "], ["cat"], ("'Cat'", "'cat '")),
        (["n01440764"], ["goldfish"], ("'n01440764'", "'goldfish'")),
    ],
)
def test_missing_and_ambiguous_classes_are_refused(
    names: list[str], rows: list[str], facts: tuple[object, ...]
) -> None:
    with refused(ConfigError, "head", "photos", "head 'h'", *facts):
        _match(names, rows)


def test_only_classes_that_occur_need_a_row() -> None:
    assert _match(["cat", "dog", "eel"], ["dog", "ant"], [1]).rows == {1: 0}


@pytest.mark.parametrize(
    ("names", "rows", "message"), [(["cat", "dog"], 2, "head 'h' has no class names"), ([], 3, "")]
)
def test_classes_are_matched_by_position_if_one_side_has_no_names(
    names: list[str], rows: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    match = _match(names, rows, [0, 1])
    assert {label: match.rows[label] for label in (0, 1)} == {0: 0, 1: 1}
    assert message in (err := capsys.readouterr().err)
    assert bool(message) == bool(err)


def test_a_head_with_fewer_names_than_rows_is_refused() -> None:
    with refused(ConfigError, "head", 3, 2):
        match_classes(
            {0}, Classes((), 0, "photos"), Classes(["a", "b"], 3, "head 'h'"), "head", "choose another `head`"
        )
