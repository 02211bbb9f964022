"""Checks of arguments of public functions; each raises ConfigError with a message that begins with the name."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any, get_args

from storage_schemas.errors import ConfigError, shortened


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise ConfigError unless `value` is one of the strings of the Literal `choices`."""
    *most, last = get_args(choices)
    if value not in (*most, last):
        raise ConfigError(f"{name}: expected {', '.join(most)} or {last}, found {shortened(value)}")


def check_count(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: expected a whole number of at least 1, found {shortened(value)}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a number of at least 0."""
    if not isinstance(value, Real) or not float(value) >= 0:
        raise ConfigError(f"{name}: expected a number of at least 0, found {shortened(value)}")


def check_list(name: str, value: Any) -> None:
    """Raise ConfigError unless `value` is a collection. A string is refused: its letters would be the items."""
    if isinstance(value, str | bytes) or not isinstance(value, Collection):
        raise ConfigError(f"{name}: expected a list, found {shortened(value)}")
