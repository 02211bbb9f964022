"""Lengths in pixel space are written as fractions of the range, so that 2/255 is exact and 2 is a slip."""

from __future__ import annotations

from fractions import Fraction as ExactFraction

import pytest
from pydantic import TypeAdapter, ValidationError

from datamerge.runtime import Fraction

ADAPTER: TypeAdapter[str] = TypeAdapter(Fraction)


@pytest.mark.parametrize(
    ("text", "kept", "value"),
    [
        ("2/255", "2/255", ExactFraction(2, 255)),
        ("8 / 255", "8/255", ExactFraction(8, 255)),
        (" 2/255 ", "2/255", ExactFraction(2, 255)),
        ("0.03", "3/100", ExactFraction(3, 100)),
        (".5", "1/2", ExactFraction(1, 2)),
        ("1e-3", "1/1000", ExactFraction(1, 1000)),
        ("2.5e-3", "1/400", ExactFraction(1, 400)),
        ("0", "0", ExactFraction(0)),
        ("0/255", "0/255", ExactFraction(0)),
        ("255/255", "255/255", ExactFraction(1)),
    ],
)
def test_what_counts_as_a_fraction(text: str, kept: str, value: ExactFraction) -> None:
    assert ADAPTER.validate_python(text) == kept
    assert ExactFraction(kept) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "did you mean 2/255"),
        ("8", "did you mean 8/255"),
        ("3/2", "at most 1"),
        ("256/255", "at most 1"),
        ("0/0", "such as 2/255"),
        ("1/0", "such as 2/255"),
        ("1/00", "such as 2/255"),
        ("-1/255", "such as 2/255"),
        ("-0.1", "such as 2/255"),
        ("", "such as 2/255"),
        ("nan", "such as 2/255"),
        ("inf", "such as 2/255"),
        ("2/255/3", "such as 2/255"),
        ("two", "such as 2/255"),
        ("2/", "such as 2/255"),
        ("1.5", "such as 2/255"),
    ],
)
def test_what_does_not(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ADAPTER.validate_python(text)


def test_a_hint_is_given_for_whole_numbers_only() -> None:
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python("-1/255")
    assert "did you mean" not in str(caught.value)
