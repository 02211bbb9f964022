"""Lengths in pixel space, such as 2/255: parsed once, exact, and written down as they were given."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any, ClassVar, Self

from pydantic import GetCoreSchemaHandler
from pydantic_core import core_schema

from storage_schemas.errors import shortened

# So few digits that no number is too large to work out. ASCII: \d also means the digits of other scripts.
_NUMBER = r"(?:\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})(?:[eE][+-]?\d{1,2})?"
_LENGTH = re.compile(rf"({_NUMBER})(?:/({_NUMBER}))?", re.ASCII)


class PixelLength(Fraction):
    """An exact length in units of the pixel range [0, 1]: a `fractions.Fraction` that remembers its spelling.

    Takes `2/255`, `1.5/255`, `0.5`, `1e-3`, with or without spaces, and numbers. `float()` gives its value; `str()`
    a fraction as it was written, without spaces, and a decimal as a fraction (`0.5` → `1/2`), so that equal spellings
    give equal artifacts.

    Examples:
        >>> PixelLength("2 / 255"), float(PixelLength("1.0")), str(PixelLength("0.5"))
        (PixelLength('2/255'), 1.0, '1/2')

    Raises:
        ValueError: not such a number; negative; above 1.
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
            hint = f"; did you mean {text}/255?" if text.isdigit() and length <= 255 else ""
            raise ValueError(f"expected at most 1, the whole pixel range, found {shortened(value)}{hint}")
        self = super().__new__(cls, length)
        self._text = text if found[2] or cls.keeps_decimals else str(length)
        return self

    def __str__(self) -> str:
        return self._text

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._text!r})"

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
    """A `PixelLength` that may exceed 1, as radii of ℓ2 balls do; `str()` keeps decimals too: it names columns."""

    __slots__ = ()
    largest = None
    keeps_decimals = True
