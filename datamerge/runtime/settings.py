"""One way to configure: a pydantic model, filled from a TOML file, overridden by flags."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from fractions import Fraction as ExactFraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from storage_schemas import ConfigError, shortened
from storage_schemas.errors import SHOWN_LETTERS

# ASCII, because \d also means the digits of other scripts, such as an Arabic zero.
_FRACTION = re.compile(r"\d+\s*/\s*\d+|0?\.\d+(e-?\d{1,3})?|0|\d+(\.\d+)?e-\d{1,3}", re.IGNORECASE | re.ASCII)


def _check_fraction(text: str) -> str:
    if not _FRACTION.fullmatch(text.strip()) or re.search(r"/\s*0+$", text.strip()):
        raise ValueError(
            f"expected a fraction of the pixel range [0, 1] such as 2/255, found {shortened(text)}"
            + (f"; did you mean {text}/255?" if re.fullmatch(r"\s*[0-9]{1,3}\s*", text) else "")
        )
    value = ExactFraction(text.replace(" ", ""))
    if value > 1:
        raise ValueError(f"expected at most 1, the whole pixel range, found {shortened(text)}")
    return text.replace(" ", "") if "/" in text else str(value)


Fraction = Annotated[str, AfterValidator(_check_fraction)]
"""A length in pixel space, such as ``2/255``, decimals made a fraction; `float(ExactFraction(text))` is its value."""


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are not coerced silently, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


S = TypeVar("S", bound=Settings)


def load_settings(
    model: type[S], file: str | None, flags: Mapping[str, Any], preset: Mapping[str, Any] | None = None
) -> S:
    """Settings from a preset, overridden by a TOML file, overridden by the flags that are not None.

    Raises:
        ConfigError: the file cannot be read, or any value is wrong; every problem is named, with the closest
            known key for a misspelt one.
    """
    values: dict[str, Any] = {**(preset or {}), **(read_toml(file) if file else {})}
    values |= {name: value for name, value in flags.items() if value is not None}
    # What is written in hexadecimal may have thousands of digits, which no later message could show.
    problems = [
        f"{name[:SHOWN_LETTERS]}: expected a number of at most 64 bits, found {shortened(value)}"
        for name, value in values.items()
        if isinstance(value, int) and value.bit_length() > 63
    ]
    if not problems:
        try:
            return model.model_validate(values)
        except ValidationError as error:
            problems = [_describe(problem, model) for problem in error.errors(include_url=False)]
    raise ConfigError("; ".join(problems) + (f" (settings from {file} and flags)" if file else ""))


def read_toml(file: str) -> dict[str, Any]:
    """The contents of a TOML file; raises ConfigError."""
    try:
        with Path(file).expanduser().open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: expected a TOML file, found {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, no UTF-8, a number of thousands of digits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _describe(problem: Any, model: type[Settings]) -> str:
    name = ".".join(str(part) for part in problem["loc"])[:SHOWN_LETTERS]
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        return f"{name}: unknown setting" + (f"; did you mean {close[0]}?" if close else "")
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        return f"{name}: expected a value, found none; give it as an argument, a flag or in a --config FILE.toml"
    if problem["type"] == "value_error":
        return f"{name}: {message}" if name else message
    if problem["type"].startswith("byte_size"):
        message = "expected bytes or a size such as 200GB or 1.5TiB"
    return f"{name}: {message}, found {shortened(problem['input'])}"
