"""Lengths in pixel space, such as 2/255: parsed once, exact, and printed as they were written."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from storage_schemas.errors import shortened
from storage_schemas.schema.moments import LEVELS

# A decimal within this distance of n/255, in grey levels, is parsed as n/255.
_ROUNDING = Fraction(1, 10**6)
_DIGITS = 20
# A decimal within this distance of n/255, in grey levels, is probably a rounded n/255: the user is warned.
_NEAR = Fraction(1, 8)
# The number of digits is bounded, so that no number is too large to compute with. ASCII, because \d also matches the
# digits of other scripts.
_NUMBER = rf"(?:\d{{1,{_DIGITS}}}(?:\.\d{{0,40}})?|\.\d{{1,40}})(?:[eE][+-]?\d{{1,2}})?"
_LENGTH = re.compile(rf"({_NUMBER})(?:/({_NUMBER}))?", re.ASCII)


class PixelLength(Fraction):
    """An exact length in units of the pixel range [0, 1]: a `fractions.Fraction` that remembers its spelling.

    Accepts `2/255`, `1.5/255`, `0.5`, `1e-3`, with or without spaces around the slash, and numbers. `float()` gives
    the value. `str()` gives a fraction as it was written, without spaces, and a decimal as a fraction (`0.5` →
    `1/2`), so that equal spellings give equal artifacts. Decimals of n/255, such as Python's `2 / 255`, are parsed as
    n/255: the decimal itself may lie below it, and an attack on 8-bit pixels would lose a whole level.

    Examples:
        >>> PixelLength("2 / 255"), float(PixelLength("1.0")), str(PixelLength("0.5"))
        (PixelLength('2/255'), 1.0, '1/2')
        >>> PixelLength(8 / 255)
        PixelLength('8/255')

    Raises:
        ValueError: not such a number, negative, above 1, or of more than 20 digits.
    """

    __slots__ = ("_text",)
    _text: str
    largest: ClassVar[int | None] = 1
    keeps_decimals: ClassVar[bool] = False

    def __new__(cls, value: object) -> Self:
        text = re.sub(r"\s*/\s*", "/", value.strip()) if isinstance(value, str) else str(value)
        found = _LENGTH.fullmatch(text) if not isinstance(value, bool) else None
        denominator = Fraction(found[2] or 1) if found else Fraction(0)
        if found is None or not denominator:
            raise ValueError(f"expected a fraction of the pixel range [0, 1] such as 2/255, found {shortened(value)}")
        length = Fraction(found[1]) / denominator
        if cls.largest is not None and length > cls.largest:
            hint = f"; did you mean {text}/255?" if text.isdigit() and length <= LEVELS else ""
            found_text = shortened(text if isinstance(value, Fraction) else value)
            raise ValueError(f"expected at most 1, the whole pixel range, found {found_text}{hint}")
        if not found[2]:
            text, length = cls._decimal(text, length, isinstance(value, float))
        if max(length.numerator, length.denominator) >= 10**_DIGITS:
            raise ValueError(f"expected at most {_DIGITS} digits, found {shortened(value)}; write it as a fraction")
        self = super().__new__(cls, length)
        self._text = text
        return self

    @classmethod
    def _decimal(cls, text: str, length: Fraction, computed: bool) -> tuple[str, Fraction]:
        """Spelling and value of a decimal. The last digits of a `computed` one are rounding noise and are dropped."""
        level = round(length * LEVELS)
        if level and 0 < abs(length * LEVELS - level) < _ROUNDING:
            return f"{level}/{LEVELS}", Fraction(level, LEVELS)
        value = length.limit_denominator(10 ** (_DIGITS - 1)) or length if computed else length
        return (text if cls.keeps_decimals and value == length else str(value)), value

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text!r})"

    def __format__(self, spec: str) -> str:
        return format(float(self), spec) if spec else str(self)

    # Fraction uses these to compare with floats and decimals; they must return plain fractions.
    from_float = Fraction.from_float  # type: ignore[assignment]  # a classmethod
    from_decimal = Fraction.from_decimal  # type: ignore[assignment]  # a classmethod

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._text,)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if type(value) is cls else cls(value),
            serialization=core_schema.to_string_ser_schema(),
        )


class Radius(PixelLength):
    """A `PixelLength` that may exceed 1, as radii of ℓ2 balls do. `str()` keeps decimals, for names of columns."""

    __slots__ = ()
    largest = None
    keeps_decimals = True


def rounded_level(given: object, *, radius: bool) -> str | None:
    """A warning for a decimal that is nearly n/255: on the 8-bit grid 0.0078 is a radius of one level, not two.

    Args:
        given: a length as the user wrote it; fractions are not questioned.
        radius: whether it is a radius, which is rounded down to whole levels.

    Returns:
        A sentence with the remedy; None for all other lengths and for values that are no length.
    """
    if isinstance(given, bool | Fraction) or not isinstance(given, int | float | str) or "/" in str(given):
        return None
    try:
        levels = PixelLength(given) * LEVELS
    except ValueError:
        return None
    level = round(levels)
    if not level or not 0 < abs(levels - level) < _NEAR:
        return None
    reach = f" 8-bit pixels then move by at most {math.floor(levels)}/{LEVELS};" if radius else ""
    meant = f"write {level}/{LEVELS}, or {levels / LEVELS} if that is meant"
    return f"{given} is {float(levels):.4g}/{LEVELS};{reach} {meant}"


def lost_levels(length: Fraction) -> str | None:
    """A warning for a radius that is not a whole number of levels on the 8-bit grid; None if it is."""
    levels = length * LEVELS
    if levels.denominator == 1:
        return None
    return f"{length} is {float(levels):.4g}/{LEVELS}; 8-bit pixels move by at most {math.floor(levels)}/{LEVELS}"
