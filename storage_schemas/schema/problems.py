"""Pydantic's validation errors in the form of our messages: expected …, found …."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from storage_schemas.errors import shortened

_EXPECTED = re.compile(r"^[A-Z][a-z]+ should (be|have) (a valid )?")


def in_words(problem: Mapping[str, Any]) -> str:
    """The expected and the found value of one entry of `ValidationError.errors()`."""
    if problem["type"] == "missing":
        return "expected a value, found none"
    if problem["type"] == "extra_forbidden":
        return "expected no such entry"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return str(message)
    message = _EXPECTED.sub(lambda found: f"expected {'a ' if found[2] else ''}", message).partition(", unable to")[0]
    return f"{message}, found {shortened(problem['input'])}"


def listed(problems: Sequence[Mapping[str, Any]], most: int) -> str:
    """The first `most` problems with their paths in the document, as one line."""
    places = [".".join(map(str, problem["loc"])) or "the file" for problem in problems[:most]]
    shown = [f"{place}: {in_words(problem)}" for place, problem in zip(places, problems, strict=False)]
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(shown) + more
