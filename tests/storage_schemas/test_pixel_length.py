"""Lengths in pixel space are fractions of the pixel range: 2/255 is exact, and 2 is refused as a slip."""

from __future__ import annotations

import copy
import pickle
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from storage_schemas.schema.pixel_length import PixelLength, Radius

ADAPTER = TypeAdapter(PixelLength)


@pytest.mark.parametrize(
    ("text", "kept", "value"),
    [
        ("2/255", "2/255", Fraction(2, 255)),
        ("8 / 255", "8/255", Fraction(8, 255)),
        (" 2/255 ", "2/255", Fraction(2, 255)),
        ("0.03", "3/100", Fraction(3, 100)),
        (".5", "1/2", Fraction(1, 2)),
        ("1e-3", "1/1000", Fraction(1, 1000)),
        ("2.5e-3", "1/400", Fraction(1, 400)),
        ("0", "0", Fraction(0)),
        ("0/255", "0/255", Fraction(0)),
        ("255/255", "255/255", Fraction(1)),
        ("1.0", "1", Fraction(1)),
        ("1.5/255", "1.5/255", Fraction(3, 510)),
        (0.25, "1/4", Fraction(1, 4)),
        (Fraction(1, 170), "1/170", Fraction(1, 170)),
    ],
)
def test_fractions_and_decimals_are_accepted(text: object, kept: str, value: Fraction) -> None:
    length = ADAPTER.validate_python(text)
    assert (str(length), length, float(length)) == (kept, value, float(value))
    assert ADAPTER.dump_json(length) == f'"{kept}"'.encode()
    for again in (pickle.loads(pickle.dumps(length)), copy.deepcopy(length), PixelLength(str(length))):
        assert (str(again), again) == (kept, value)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("2", r"2/255\?"),
        ("8", r"8/255\?"),
        ("3/2", "at most 1"),
        ("256/255", "at most 1"),
        ("0/0", "2/255,"),
        ("1/0", "2/255,"),
        ("1/00", "2/255,"),
        ("-1/255", "2/255,"),
        ("-0.1", "2/255,"),
        ("", "2/255,"),
        ("nan", "2/255,"),
        ("inf", "2/255,"),
        ("2/255/3", "2/255,"),
        ("two", "2/255,"),
        ("2/", "2/255,"),
        ("1.5", "at most 1"),
        (True, "2/255,"),
        ("1e999999999", "2/255,"),
    ],
)
def test_other_values_are_refused(text: object, fact: str) -> None:
    with pytest.raises(ValidationError, match=fact):
        ADAPTER.validate_python(text)


def test_a_hint_is_given_for_whole_numbers_only() -> None:
    with pytest.raises(ValidationError) as caught:
        ADAPTER.validate_python("-1/255")
    assert "255?" not in str(caught.value)


def test_radii_may_exceed_the_range_and_stay_radii() -> None:
    radius = TypeAdapter(Radius).validate_python("3")
    assert pickle.loads(pickle.dumps(radius)) == Radius(3)
    with pytest.raises(ValueError, match="3/255"):
        PixelLength(radius)


def test_decimals_of_a_level_are_that_level() -> None:
    """The float 2/255 lies below the fraction 2/255: rounded down to whole levels, it would be 1/255."""
    for level in range(256):
        for value in (level / 255, repr(level / 255), f"{level / 255:.10f}", f"{level / 255:.12e}"):
            assert PixelLength(value) * 255 == level
    assert (str(PixelLength(8 / 255)), str(Radius(8 / 255)), str(PixelLength("0.2"))) == ("8/255", "8/255", "1/5")
    assert PixelLength("0.0078") * 255 == Fraction("1.989")  # too few digits to have been meant as 2/255


@given(st.floats(1e-18, 1), st.sampled_from([PixelLength, Radius]))
def test_computed_values_survive_conversion_to_text(value: float, kind: type[PixelLength]) -> None:
    length = kind(value)
    assert float(length) == pytest.approx(value, abs=1e-8)
    assert kind(str(length)) == length == pickle.loads(pickle.dumps(length))


@pytest.mark.parametrize("value", ["1e-25", 1e-25, "0." + "1" * 30, "1/" + "9" * 21])
def test_too_many_digits_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"2/255,|20 "):
        PixelLength(value)


def test_a_pixel_length_is_a_number() -> None:
    length = PixelLength("1/2")
    assert length == 0.5
    assert length < 0.75
    assert max(length, 0.25) is length
    assert (f"{length}", f"{length:.2f}", type(length * 2)) == ("1/2", "0.50", Fraction)
