"""Settings: a pydantic model, filled from a TOML file and overridden by flags."""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from storage_schemas import ConfigError, shortened
from storage_schemas.access.local_paths import user_path
from storage_schemas.errors import SHOWN_LETTERS
from storage_schemas.schema.problems import in_words


@dataclass(frozen=True)
class Effect:
    """The condition under which some settings have an effect; otherwise a value that the user sets is refused.

    Attributes:
        of: names of these settings.
        when: the condition, a function of all settings.
        advice: why they have no effect and what to do; a format string of `name`, the setting, and `settings`, all.
    """

    of: tuple[str, ...]
    when: Callable[[Any], bool]
    advice: str


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values are not coerced silently, instances are immutable.

    Numbers have to be finite. A setting that the user chose but that has no effect is refused (`effects`).

    Paths, tuples and NumPy integers are converted to the text, list or integer of a TOML file.

    Raises:
        ConfigError: any value is wrong; the message names every problem, and suggests a key for a misspelt one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    renamed: ClassVar[Mapping[str, str]] = {}
    """Spellings of earlier releases, `name` or `name=value` → their replacement, for a hint."""

    effects: ClassVar[Sequence[Effect]] = ()
    """Settings that have an effect only together with others."""

    if not TYPE_CHECKING:  # type checkers derive the signature from the fields

        def __init__(self, **values: Any) -> None:
            values = {name: _as_in_toml(value) for name, value in values.items()}
            # A hexadecimal number may have thousands of digits, which Python refuses to print in a later message.
            problems = [
                (name, f"expected a number of at most 64 bits, found {shortened(value)}")
                for name, value in values.items()
                if isinstance(value, int) and value.bit_length() > 63
            ]
            if not problems:
                try:
                    super().__init__(**values)
                    return
                except ValidationError as error:
                    problems = [_describe(problem, type(self)) for problem in error.errors(include_url=False)]
            raise _refusal(problems)

    @model_validator(mode="after")
    def _have_effect(self) -> Self:
        for effect in self.effects:
            chosen = next((name for name in effect.of if self._is_chosen(name)), None)
            if chosen is not None and not effect.when(self):
                raise ValueError(f"{chosen}: {effect.advice.format(name=chosen, settings=self)}")
        return self

    def _is_chosen(self, name: str) -> bool:
        """Whether the user chose a setting; writing out its default counts, unless that is off."""
        if name not in self.model_fields_set or getattr(self, name) is None:
            return False
        default = type(self).model_fields[name].get_default(call_default_factory=True)
        # Settings read back from a dump are all set; those equal to their default were not chosen.
        chosen = default is not False and self.model_fields_set != set(type(self).model_fields)
        return chosen or getattr(self, name) != default


S = TypeVar("S", bound=Settings)


def load_settings(
    model: type[S], file: str | None, flags: Mapping[str, Any], preset: Mapping[str, Any] | None = None
) -> S:
    """Settings from a preset, overridden by a TOML file, overridden by flags that are not None.

    Raises:
        ConfigError: the file cannot be read, or any value is wrong.
    """
    # Defaults that a preset repeats do not count as chosen.
    given = {name: value for name, value in (preset or {}).items() if not _is_default(model, name, value)}
    values: dict[str, Any] = {**given, **(read_toml(file) if file else {})}
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return model(**values)
    except ConfigError as error:
        if file is None:
            raise
        raise ConfigError(f"{error} (settings from {file} and flags)", about=error.field) from None


def read_toml(file: str) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        ConfigError: the file cannot be read, or is not valid TOML.
    """
    try:
        with user_path(file).open("rb") as stream:
            return tomllib.load(stream)
    except OSError as error:
        raise ConfigError(f"{file}: expected a TOML file, found {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, not UTF-8, or a number with thousands of digits
        raise ConfigError(f"{file}: not valid TOML: {error}") from None


def _is_default(model: type[Settings], name: str, value: Any) -> bool:
    field = model.model_fields.get(name)
    return field is not None and bool(field.get_default(call_default_factory=True) == value)


def _as_in_toml(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_as_in_toml(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return int(value) if isinstance(value, Integral) and not isinstance(value, (bool, int)) else value


def _refusal(problems: list[tuple[str, str]]) -> ConfigError:
    text = "; ".join(f"{name}: {message}" if name else message for name, message in problems)
    return ConfigError(text, about=problems[0][0] or None)


def _describe(problem: Any, model: type[Settings]) -> tuple[str, str]:
    """The name of the setting, and the problem with its value."""
    # For a wrong item of a list, the setting is the list.
    name = str(problem["loc"][0])[:SHOWN_LETTERS] if problem["loc"] else ""
    message = in_words(problem)
    spelling = f"{name}={problem['input']}" if isinstance(problem["input"], str) else ""
    if problem["type"] == "extra_forbidden":
        if name in model.renamed:
            return name, f"unknown setting; it is called {model.renamed[name]} now"
        close = difflib.get_close_matches(name, model.model_fields, n=1)
        return name, "unknown setting" + (f"; did you mean {close[0]}?" if close else "")
    if spelling in model.renamed:
        return name, f"{problem['input']!r} is written {model.renamed[spelling]} now"
    if problem["type"] == "value_error":
        # Errors from validators of the whole model start with the name of the setting.
        found = re.match(r"(\w+): ", message) if not name else None
        return (found[1], message[found.end() :]) if found and found[1] in model.model_fields else (name, message)
    if problem["type"].startswith("byte_size"):
        message = f"expected bytes or a size such as 200GB or 1.5TiB, found {shortened(problem['input'])}"
    return name, message
